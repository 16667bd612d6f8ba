"""What a process of a job does, however it was launched: join the other ranks, then train or evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from data_pipeline.common.progress_bar import progress_bar
from trainer.checkpoint import sharded as checkpoint
from trainer.config import load
from trainer.engine import uses_bf16
from trainer.evaluation.protocol import Results
from trainer.evaluation.suite import Suite, SuiteConfig
from trainer.inference import network as extraction
from trainer.inference.embedder import Embedder, Network
from trainer.loop import run
from trainer.report import evaluation as files
from trainer.report.summary import device_name
from trainer.runtime.ranks import Ranks, join
from trainer.runtime.signals import Stopped, StopRequest


def train(config: Path, overrides: Sequence[str], stop: StopRequest) -> None:
    """Train as the configuration file says, changed by `key=value` overrides.

    `stop` is made, and entered, by whoever starts the process, before this module is imported: that takes
    seconds, in which a signal would end the process instead of stopping the run.

    A failure is printed by the first rank that has one and ends the process with exit code 1. Raises Stopped
    on all ranks if a signal asked any of them to stop.
    """
    with join() as ranks:
        stopped_by = run(load(config, overrides), ranks, stop)
    if stopped_by:
        raise Stopped(stopped_by, is_first=ranks.is_first)


def evaluate(
    path: Path, config: SuiteConfig, *, name: str, batch_size: int, out: Path | None
) -> Results | None:
    """Results of a network on a suite called `name`, also written to the folder `out`; None but on rank 0.

    `path` is a checkpoint, a run (its newest), or a network's file (.pt, .safetensors).
    """
    with join() as ranks, _progress(ranks) as progress:
        if ranks.is_first and out is not None:
            out.mkdir(parents=True, exist_ok=True)  # not to find out after hours that it cannot be made
        suite = Suite(config)
        found = extraction.network_of(path, ranks)
        network = _with_autocast(found, ranks)
        results = suite.evaluate(Embedder(network, found.image_size, batch_size, ranks, progress=progress))
        if ranks.is_first and out is not None:
            about = {
                "suite": name,
                "checkpoint": str(path),
                "step": found.step,
                "world_size": ranks.world_size,
                "device": device_name(ranks.device),
                "versions": checkpoint.versions(),
            }
            files.write(out, results, about)
    return results if ranks.is_first else None


def _progress(ranks: Ranks) -> AbstractContextManager[Callable[[int, int], None]]:
    return progress_bar("embedding") if ranks.is_first else nullcontext(lambda done, total: None)


def _with_autocast(found: extraction.Network, ranks: Ranks) -> Network:
    is_bf16 = uses_bf16(found.engine, ranks.device)

    @torch.inference_mode()
    def network(images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=is_bf16):
            return found.model(images_BCHW).emb_BD.float()

    return network
