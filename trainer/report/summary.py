"""Results of a finished run: `result.json` and `report.html`."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.common.terminal import echo
from data_pipeline.source import Source
from data_pipeline.synthetic.dataset import read_nuisances
from trainer.checkpoint.sharded import versions
from trainer.config import Schedule
from trainer.evaluation.during_training import Evaluation
from trainer.evaluation.metrics.by_nuisance import Split, by_nuisance
from trainer.monitoring.metrics_log import is_number, read, write_result
from trainer.report.evaluation import as_json
from trainer.report.training import write_report
from trainer.runtime.ranks import Ranks

_FACES = 24
_EXAMPLE_PAIRS = 12
_ROW_BYTES = 1000  # of the table of an image's nuisances, at most


def conclude(
    run_dir: Path,
    *,
    config_text: str,
    schedule: Schedule,
    global_batch: int,
    source: Source,
    evaluation: Evaluation,
    ranks: Ranks,
) -> None:
    """Write result.json and report.html from the records of the run and its last evaluation.

    If the report cannot be written, this is shown, and the run has succeeded nevertheless.
    """
    write_result(run_dir, _result(read(run_dir), schedule, global_batch, evaluation, ranks))
    with _showing_errors(f"{run_dir / 'report.html'} could not be written"):
        write_report(
            run_dir,
            results=evaluation.results,
            faces=source.faces(_FACES),
            config_text=config_text,
            pairs=_examples(evaluation),
            splits=_splits(evaluation),
        )


@contextlib.contextmanager
def _showing_errors(text: str) -> Iterator[None]:
    """Show an error of the block on standard error, after `text`, and continue behind the block."""
    try:
        yield
    except Exception as error:  # of files that only the report needs
        echo(f"lgaf: {text}: {type(error).__name__}: {error}", err=True)


def _result(
    records: list[dict[str, Any]],
    schedule: Schedule,
    global_batch: int,
    evaluation: Evaluation,
    ranks: Ranks,
) -> dict[str, Any]:
    verified = evaluation.verified
    trained = [record for record in records if record["kind"] == "train"]
    untrained = [
        record["accuracy"]
        for record in records
        if (record["kind"], record["step"]) == ("evaluation", 0)
        and record.get("set") in verified
        and is_number(record.get("accuracy"))
    ]
    # The first records include one-time costs: caches, compilation, allocation.
    steady = trained[schedule.log_every :] or trained
    step_s = [record["step_s"] for record in steady if is_number(record.get("step_s"))]
    return {
        "verification_accuracy": _mean([result.accuracy for result in verified.values()]),
        "verification_accuracy_untrained": _mean(untrained),
        "verification": {name: result.summary() for name, result in verified.items()},
        "suite": as_json({n: tasks for n, tasks in evaluation.results.items() if n not in verified}),
        "samples_per_s": global_batch * len(step_s) / sum(step_s) if sum(step_s) else 0,
        "final_loss": trained[-1].get("loss") if trained else None,
        "steps": schedule.steps,
        "world_size": ranks.world_size,
        "device": device_name(ranks.device),
        "versions": {"python": platform.python_version(), **versions()},
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _examples(evaluation: Evaluation) -> list[tuple[bytes, bytes, bool, float, float]]:
    """Return pairs of the first set, half decided wrongly (if there are enough), half decided correctly."""
    name = next(iter(evaluation.verified), None)
    if name is None:
        return []
    images, result = evaluation.sets[name].pairs.images, evaluation.verified[name]
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


def _splits(evaluation: Evaluation) -> dict[str, Split]:
    """Return accuracies by nuisance for the first set with a table of its images; empty if none has one."""
    for name, pairs in evaluation.sets.items():
        table = pairs.path.with_name(f"{pairs.path.stem}_nuisances.tsv")
        if table.is_file():
            with _showing_errors(f"{table} is not used in the report"):
                result = evaluation.verified[name]
                most_bytes = _ROW_BYTES * (2 * len(result.issame_P) + 1)
                if table.stat().st_size > most_bytes:
                    raise ValueError(f"expected at most {most_bytes} bytes, found {table.stat().st_size}")
                return by_nuisance(result, read_nuisances(table))
    return {}


def _spread(indices: np.ndarray, count: int) -> list[int]:
    at = np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)
    return [int(i) for i in indices[at]]
