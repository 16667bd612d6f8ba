"""Results of a finished run: `result.json` for programs, `report.html` for people."""

from __future__ import annotations

import json
import platform
from typing import Any

import numpy as np
import torch

from data_pipeline.source import Source
from data_pipeline.synthetic.dataset import read_nuisances
from trainer.checkpoint import sharded as checkpoint
from trainer.config import RunConfig
from trainer.evaluation.during_training import Evaluation
from trainer.evaluation.metrics.by_nuisance import Split, by_nuisance
from trainer.evaluation.metrics.verification import VerificationResult
from trainer.monitoring.metrics_log import read, write_result
from trainer.report.evaluation import as_json
from trainer.report.training import write_report
from trainer.runtime.ranks import Ranks

_FACES = 24
_EXAMPLE_PAIRS = 12


def conclude(
    config: RunConfig,
    source: Source,
    evaluation: Evaluation,
    ranks: Ranks,
) -> None:
    """Write result.json and report.html from the records of the run and its last evaluation."""
    write_result(config.run_dir, _result(config, source, evaluation, ranks))
    write_report(
        config.run_dir,
        results=evaluation.results,
        faces=source.faces(_FACES),
        config_text=json.dumps(config.model_dump(mode="json"), indent=2),
        pairs=_examples(evaluation),
        splits=_splits(config, evaluation.judged),
    )


def _result(config: RunConfig, source: Source, evaluation: Evaluation, ranks: Ranks) -> dict[str, Any]:
    judged, records = evaluation.judged, read(config.run_dir)
    trained = [record for record in records if record["kind"] == "train"]
    untrained = [
        record
        for record in records
        if (record["kind"], record["step"]) == ("evaluation", 0) and record["set"] in judged
    ]
    # The first records include one-time costs: caches, compilation, allocation.
    steady = trained[config.log_every_steps :] or trained
    return {
        "verification_accuracy": _mean([result.accuracy for result in judged.values()]),
        "verification_accuracy_untrained": _mean([record["accuracy"] for record in untrained]),
        "verification": {name: result.summary() for name, result in judged.items()},
        "suite": as_json({n: tasks for n, tasks in evaluation.results.items() if n not in judged}),
        "samples_per_s": len(steady) and config.global_batch * len(steady) / sum(r["step_s"] for r in steady),
        "final_loss": trained[-1]["loss"] if trained else None,
        "steps": config.total_steps(source.images),
        "world_size": ranks.world_size,
        "device": device_name(ranks.device),
        "versions": {"python": platform.python_version(), **checkpoint.versions()},
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _examples(evaluation: Evaluation) -> list[tuple[bytes, bytes, bool, float, float]]:
    """Return pairs of the first set, half judged wrongly (if there are enough), half judged correctly."""
    name = next(iter(evaluation.judged), None)
    if name is None:
        return []
    images, result = evaluation.sets[name].pairs.images, evaluation.judged[name]
    wrong, right = np.flatnonzero(~result.correct), np.flatnonzero(result.correct)
    chosen = [*_spread(wrong, _EXAMPLE_PAIRS // 2), *_spread(right, _EXAMPLE_PAIRS // 2)]
    return [
        (
            images[2 * pair],
            images[2 * pair + 1],
            bool(result.issame_P[pair]),
            float(result.similarity_P[pair]),
            float(result.threshold_P[pair]),
        )
        for pair in chosen
    ]


def _splits(config: RunConfig, judged: dict[str, VerificationResult]) -> dict[str, Split]:
    """Return accuracies by nuisance for the first set with a table of its images; empty if none has one."""
    for name, path in config.verification_files().items():
        table = path.with_name(f"{path.stem}_nuisances.tsv")
        if table.is_file():
            return by_nuisance(judged[name], read_nuisances(table))
    return {}


def _spread(indices: np.ndarray, count: int) -> list[int]:
    at = np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)
    return [int(i) for i in indices[at]]
