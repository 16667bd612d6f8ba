"""What a process of a job does, however it was launched: join the other ranks, then train or evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer import backbones, checkpoint, checkpoint_files
from trainer.config import RunConfig, files_by_name, load
from trainer.distributed import Ranks, join
from trainer.engine import uses_bf16
from trainer.evaluation.pair_protocol import VerificationResult
from trainer.evaluation.verification import Embed, PairSets
from trainer.loop import run
from trainer.signals import Stopped, StopRequest


def train(config: Path, overrides: Sequence[str] = ()) -> None:
    """Train as the configuration file says, changed by `key=value` overrides.

    A failure is printed by the first rank that has one and ends the process with exit code 1. Raises Stopped
    on all ranks if a signal asked any of them to stop.
    """
    with StopRequest() as stop, join() as ranks:
        stopped_by = run(load(config, overrides), ranks, stop)
    if stopped_by:
        raise Stopped(stopped_by, is_first=ranks.is_first)


def evaluate(path: Path, pairs: Sequence[Path], batch_size: int) -> dict[str, VerificationResult] | None:
    """Results of a checkpoint's (or a run's newest) backbone on verification files; None but on rank 0."""
    with join() as ranks:
        found = checkpoint.locate(path, group=ranks.group)
        config = RunConfig.model_validate(checkpoint_files.read_manifest(found).header.config)
        model = backbones.build(config.backbone, config.data.image_size).to(ranks.device).eval()
        checkpoint.load(found, checkpoint.backbone_state(model), group=ranks.group)
        sets = PairSets(
            files_by_name(pairs),
            image_size=config.data.image_size,
            batch_size=batch_size,
            ranks=ranks,
        )
        results = sets.evaluate(_embedder(model, config, ranks))
    return results if ranks.is_first else None


def _embedder(model: backbones.Backbone, config: RunConfig, ranks: Ranks) -> Embed:
    is_bf16 = uses_bf16(config.engine, ranks.device)

    @torch.inference_mode()
    def embed(images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=is_bf16):
            return model(images_BCHW).emb_BD.float()

    return embed
