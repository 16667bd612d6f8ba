"""Network and head of a run: new, with the weights of a file, or restored; and the run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from data_pipeline.source import Source
from partial_fc.head import PartialFC
from trainer import backbones
from trainer.backbones import weights
from trainer.checkpoint import directory as checkpoint_files
from trainer.checkpoint import sharded as checkpoint
from trainer.checkpoint.async_saver import Saver
from trainer.checkpoint.directory import Header
from trainer.config import RunConfig, differences
from trainer.engine import Engine
from trainer.run_log import RunLog
from trainer.runtime.ranks import Ranks, gather_json
from trainer.saved_config import from_saved


class TrainState(NamedTuple):
    """Network and head; all ranks use them together."""

    engine: Engine
    head: PartialFC

    def state(self) -> checkpoint.State:
        """Return the tensors to be saved, on the live memory."""
        return {**self.engine.state(), "head": self.head.logical_state()}

    def restore(self, folder: Path, ranks: Ranks) -> Header:
        """Restore network and head from a checkpoint; return its header. Raises CheckpointError."""
        state = self.state()
        checkpoint.load(folder, state, group=ranks.group)
        self.engine.load_state(state)
        return checkpoint_files.read_manifest(folder).header


class Checkpoints:
    """The checkpoints of a run: they are saved beside the training, and restored into `state`."""

    def __init__(
        self, config: RunConfig, source: Source, state: TrainState, ranks: Ranks, log: RunLog
    ) -> None:
        self._config, self._identity, self._state, self._ranks = config, source.identity, state, ranks
        self._saver = Saver(
            config.run_dir, config.checkpoint, group=ranks.group, metrics=log.metrics, say=log.say
        )
        self.prepare = lambda: self._saver.prepare(state.state())
        self.look, self.has_saved, self.close = self._saver.look, self._saver.has_saved, self._saver.close
        self.wait = self._saver.wait

    def save(self, step: int, cursor: list[list[int]] | None, *, is_last: bool) -> None:
        """Save the state after `step` steps; the last save is on the disk when this returns."""
        self._state.engine.synchronize_statistics()
        header = Header(
            step, self._config.model_dump(mode="json"), self._identity, checkpoint.versions(), cursor
        )
        self._saver.save(self._state.state, header, is_last=is_last)

    def restore(self) -> tuple[Path, Header] | None:
        """Bring the state to where the newest checkpoint has it; None if there is no checkpoint."""
        latest = newest_checkpoint(self._config, self._ranks)
        return None if latest is None else (latest, self._state.restore(latest, self._ranks))

    def clean(self) -> None:
        """Remove what is being written."""
        checkpoint_files.clean(self._config.run_dir)


def build_or_resume(
    config: RunConfig, source: Source, ranks: Ranks, micro: int
) -> tuple[TrainState, Header | None]:
    """Return network and head as the run was last saved, with the saved header; or new ones, with None.

    Raises ValueError if the run directory holds another run, or the file of weights does not fit, and
    CheckpointError, which is one, if there are checkpoints but none can be read.
    """
    torch.manual_seed(config.seed)
    model = backbones.build(config.backbone, config.data.image_size).to(ranks.device)
    head = PartialFC(
        config.head,
        num_classes=source.num_classes,
        embedding_size=model.embedding_size,
        seed=config.seed,
        group=ranks.group,
        device=ranks.device,
    )
    latest = newest_checkpoint(config, ranks)
    if latest is not None:
        _refuse_changes(config, source, checkpoint_files.read_manifest(latest).header)
    elif config.backbone.weights is not None:
        _load_weights(model, config.backbone.weights, ranks)
    engine = Engine(
        model,
        config.engine,
        config.optimizer,
        micro_batch=micro,
        group=ranks.group,
        device=ranks.device,
    )
    trained = TrainState(engine, head)
    return trained, None if latest is None else trained.restore(latest, ranks)


def newest_checkpoint(config: RunConfig, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint, None if there is none; what killed saves have left goes."""
    if ranks.is_first:
        checkpoint_files.clean(config.run_dir)
    return checkpoint.newest(config.run_dir, group=ranks.group)


def _load_weights(model: backbones.Backbone, file: Path, ranks: Ranks) -> None:
    """Begin with the weights in `file`. Raises ValueError if it does not fit or ranks see different ones."""
    sums = gather_json(weights.load(model, file), ranks.group)
    if len(set(sums)) > 1:
        other = next(rank for rank, crc32 in enumerate(sums) if crc32 != sums[0])
        raise ValueError(
            f"backbone.weights = {file}: expected the same file on all ranks, found that those of ranks 0 "
            f"and {other} differ; copy one to all nodes, or share it"
        )


def _refuse_changes(config: RunConfig, source: Source, header: Header) -> None:
    try:
        # Keys that are newer than the checkpoint had their defaults then.
        before = from_saved(header.config).model_dump(mode="json")
    except ValidationError:
        before = header.config
    changed = differences(
        {**before, "dataset": header.dataset},
        {**config.model_dump(mode="json"), "dataset": source.identity},
    )
    if changed:
        raise ValueError(
            f"{config.run_dir} holds a run of another configuration, at step {header.step}; "
            f"changed keys: {'; '.join(changed)}; change them back, or set another run_dir"
        )
