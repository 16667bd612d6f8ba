"""Network and head of a run, new, initialised from a file or restored; and the checkpoints of the run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.source import Source
from partial_fc.head import PartialFC
from trainer import backbones
from trainer.backbones import weights
from trainer.checkpoint import directory, sharded
from trainer.checkpoint.async_saver import Saver
from trainer.checkpoint.directory import Header
from trainer.config import RunConfig, differences
from trainer.engine import Engine
from trainer.run_log import RunLog
from trainer.runtime.ranks import Ranks, gather_json
from trainer.saved_config import from_saved


class TrainState(NamedTuple):
    """Network and head; all ranks call its methods together."""

    engine: Engine
    head: PartialFC

    def state(self) -> sharded.State:
        """Return the tensors of a checkpoint; they share the memory of network and head where possible."""
        return {**self.engine.state(), "head": self.head.logical_state()}

    def restore(self, folder: Path, ranks: Ranks) -> Header:
        """Restore network and head from a checkpoint; return its header. Raises CheckpointError."""
        state = self.state()
        sharded.load(folder, state, group=ranks.group)
        self.engine.load_state(state)
        return directory.read_manifest(folder).header


class Checkpoints:
    """The checkpoints of a run, which are saved while training continues and restored into `state`."""

    def __init__(
        self, config: RunConfig, source: Source, state: TrainState, ranks: Ranks, log: RunLog
    ) -> None:
        self._config, self._fingerprint, self._state, self._ranks = config, source.fingerprint, state, ranks
        self._saver = Saver(
            config.run_dir, config.checkpoint, group=ranks.group, metrics=log.metrics, say=log.say
        )
        self.prepare = lambda: self._saver.prepare(state.state())
        self.must_retry_save, self.has_saved = self._saver.must_retry, self._saver.has_saved
        self.wait, self.close = self._saver.wait, self._saver.close

    def save(self, step: int, cursor: list[list[int]] | None, *, is_last: bool) -> None:
        """Start to save the state after `step` steps; the last save is on the disk on return."""
        self._state.engine.synchronize_statistics()
        header = Header(
            step, self._config.model_dump(mode="json"), self._fingerprint, sharded.versions(), cursor
        )
        self._saver.save(self._state.state, header, is_last=is_last)

    def restore(self) -> tuple[Path, Header] | None:
        """Restore the state from the newest checkpoint; return None if there is no checkpoint."""
        latest = newest_checkpoint(self._config.run_dir, self._ranks)
        return None if latest is None else (latest, self._state.restore(latest, self._ranks))

    def clean(self) -> None:
        """Remove unfinished checkpoints."""
        directory.clean(self._config.run_dir)


def build_or_resume(
    config: RunConfig, source: Source, ranks: Ranks, micro: int
) -> tuple[TrainState, Header | None]:
    """Return network and head from the newest checkpoint, with its header; or new ones, with None.

    Raises ValueError if the run directory holds a run of another configuration or the file of weights does
    not match the network, and its subclass CheckpointError if no existing checkpoint can be read.
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
    latest = newest_checkpoint(config.run_dir, ranks)
    if latest is not None:
        _refuse_changes(config, source, directory.read_manifest(latest).header)
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
    state = TrainState(engine, head)
    return state, None if latest is None else state.restore(latest, ranks)


def newest_checkpoint(run_dir: Path, ranks: Ranks) -> Path | None:
    """Remove the remains of killed saves; return the newest intact checkpoint, None if there is none."""
    if ranks.is_first:
        directory.clean(run_dir)
    return sharded.newest(run_dir, group=ranks.group)


def _load_weights(model: backbones.Backbone, file: Path, ranks: Ranks) -> None:
    """Load the weights in `file`. Raises ValueError if they do not match or differ between ranks."""
    sums = gather_json(weights.load(model, file), ranks.group)
    if len(set(sums)) > 1:
        other = next(rank for rank, crc32 in enumerate(sums) if crc32 != sums[0])
        raise ValueError(
            f"backbone.weights = {file}: expected the same file on all ranks, found different files on ranks "
            f"0 and {other}; copy one of them to all nodes, or use a shared file system"
        )


def _refuse_changes(config: RunConfig, source: Source, header: Header) -> None:
    try:
        # Keys that are newer than the checkpoint had the behaviour of their defaults.
        before = from_saved(header.config).model_dump(mode="json")
    except ValueError:
        before = header.config
    changed = differences(
        {**before, "dataset": header.dataset},
        {**config.model_dump(mode="json"), "dataset": source.fingerprint},
    )
    if changed:
        raise ValueError(
            f"run_dir {config.run_dir}: expected a run of this configuration, found another one at step "
            f"{header.step}; changed keys: {'; '.join(changed)}; change them back, or set another run_dir"
        )
