"""Checkpoints of a run's state that any number of ranks can write and any other number can read.

    save     each rank writes its part of every tensor and computes a checksum while it writes
             (trainer/checkpoint/storage.py); then trainer/checkpoint/directory.py publishes the folder
    newest   find the latest intact checkpoint of a run; the ranks divide the files to verify among them
    load     each rank reads the rows that it needs

All ranks of a group call these functions together, and all get the same outcome. No code in a checkpoint is
executed: tensors are plain bytes, described by the JSON of the manifest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from data_pipeline.common.terminal import echo
from trainer.checkpoint import directory, storage
from trainer.checkpoint.checksummed_file import FileSum
from trainer.checkpoint.directory import CheckpointError, Header
from trainer.checkpoint.storage import State
from trainer.runtime.ranks import from_first, gather_json


def backbone_state(model: nn.Module) -> State:
    """Return the network's parts of a checkpoint, which share their memory with `model`.

    Frozen parameters are constants of the architecture and are not saved.
    """
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {"backbone_weight": weights, "backbone_buffer": dict(model.named_buffers())}


def share_out(state: State, rank: int, size: int) -> State:
    """Return the tensors that one of `size` ranks writes: its rows of sharded ones, and some replicated ones.

    Replicated tensors are assigned large ones first, each to the rank with the fewest bytes so far.
    """
    common = [(t.nbytes, part, name) for part, name, t in _tensors(state) if not isinstance(t, DTensor)]
    loads, writer = [0] * size, {}
    for nbytes, part, name in sorted(common, key=lambda item: (-item[0], *item[1:])):
        writer[part, name] = min(range(size), key=loads.__getitem__)
        loads[writer[part, name]] += nbytes
    return {
        part: {name: t for name, t in tensors.items() if writer.get((part, name), rank) == rank}
        for part, tensors in state.items()
    }


def save(
    run_dir: Path,
    state: State,
    header: Header,
    *,
    keep: int,
    keep_every_steps: int | None = None,
    group: dist.ProcessGroup,
) -> Path:
    """Write a checkpoint; then remove all but the `keep` newest intact ones and keep_every_steps' multiples.

    state: this rank's part as `share_out` returns it, its rows of sharded tensors (DTensors) and replicated
    tensors that no other rank writes.

    Raises CheckpointError on all ranks if a rank fails; the incomplete checkpoint is removed.
    """
    final = directory.final_path(run_dir, header.step)
    try:
        _write(final, state, header, group)
    except _RankFailed as error:
        if group.rank() == 0:
            directory.clean(run_dir)
        raise CheckpointError(
            f"{final} could not be written by {error}; check the disk's free space and the permissions"
        ) from error
    if group.rank() == 0:
        # This checkpoint is complete; if the disk has a problem, the next save reports it.
        with contextlib.suppress(OSError):
            for old in directory.superfluous(
                run_dir,
                keep=keep,
                every_steps=keep_every_steps,
                check=directory.wrong_size,
                until_step=header.step,
            ):
                directory.remove(old)
    return final


def newest(run_dir: Path, *, group: dist.ProcessGroup) -> Path | None:
    """Return the latest intact checkpoint of a run, None if the run has no checkpoint.

    Each damaged checkpoint that is skipped is reported once on standard error, and left unchanged.

    Raises CheckpointError if all checkpoints are damaged, ValueError on a rank that cannot see them.
    """
    names = from_first([path.name for path in directory.all_of(run_dir)] if group.rank() == 0 else [], group)
    for name in reversed(names):
        checkpoint = directory.folder_of(run_dir) / name
        if not checkpoint.is_dir():
            raise ValueError(
                f"rank 0 resumes from {checkpoint}, which this rank cannot see; "
                "put run_dir on a file system that all ranks share"
            )
        problem = _agreed_damage(checkpoint, group)
        if problem is None:
            return checkpoint
        if group.rank() == 0:
            text = f"{problem}; {checkpoint.name} is damaged and skipped"
            echo(f"lgaf: {text}", err=True)
    if names:
        raise CheckpointError(
            f"{directory.folder_of(run_dir)}: expected an intact checkpoint, found {len(names)}, all "
            "damaged; restore one from a copy, or move the folder away to restart the training"
        )
    return None


def locate(path: Path, *, group: dist.ProcessGroup) -> Path:
    """Return the checkpoint that a path names: the path itself, or the newest intact one of a run directory.

    Raises CheckpointError if there is none, or if it is damaged.
    """
    if directory.is_checkpoint(path):
        problem = _agreed_damage(path, group)
        if problem is not None:
            raise CheckpointError(f"{problem}; the checkpoint is damaged, use another")
        return path
    found = newest(path, group=group)
    if found is None:
        raise CheckpointError(
            f"{path}: expected a checkpoint (a folder with {directory.MANIFEST}) or a run directory with "
            f"checkpoints in {directory.folder_of(path)}, found none"
        )
    return found


def load(checkpoint: Path, state: State, *, group: dist.ProcessGroup) -> None:
    """Fill the tensors of `state` in place, on all ranks together; each rank reads only its rows.

    Raises CheckpointError if the checkpoint is damaged or of an older format, or if its tensors differ in
    name or shape from those of any part in `state`.
    """
    table = require_tensors(checkpoint, state)
    try:
        _on_all(group, lambda: storage.read(checkpoint, state, table))
    except _RankFailed as error:
        raise CheckpointError(
            f"{checkpoint}: a part of it could not be read by {error}; "
            "run `lgaf checkpoint verify` to check it for damage"
        ) from error


class _RankFailed(Exception):  # noqa: N818
    """A rank has failed; raised on all ranks, with that rank and its error."""


def _on_all(group: dist.ProcessGroup, act: Callable[[], Any]) -> list[Any]:
    """Call `act` on every rank, and return the results of all ranks, which must be plain JSON values.

    Raises _RankFailed on all ranks if one fails, so that no rank waits for one that has exited.
    """
    try:
        mine = {"result": act()}
    except Exception as error:
        mine = {"failure": f"{type(error).__name__}: {error}"}
    outcomes = gather_json(mine, group)
    for rank, outcome in enumerate(outcomes):
        if "failure" in outcome:
            raise _RankFailed(f"rank {rank}: {outcome['failure']}")
    return [outcome["result"] for outcome in outcomes]


def _by_first(group: dist.ProcessGroup, act: Callable[[], object]) -> None:
    """Call `act` on rank 0 only. Raises _RankFailed on all ranks if it fails."""

    def act_on_first() -> None:
        if group.rank() == 0:
            act()

    _on_all(group, act_on_first)


def _agreed_damage(checkpoint: Path, group: dist.ProcessGroup) -> str | None:
    """Return a problem that any rank finds in its share of the files, or None; sizes are checked first."""
    for check in (directory.wrong_size, directory.wrong_sum):
        for problem in gather_json(check(checkpoint, group.rank(), group.size()), group):
            if problem is not None:
                return str(problem)
    return None


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute, for the record of a run."""
    names = ("lgaf", "torch", "deepspeed", "nvidia-dali-cuda130", "numpy")
    return {name: version(name) for name in names}


def _tensors(state: State) -> Iterator[tuple[str, str, torch.Tensor]]:
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            yield part, name, tensor


def _write(final: Path, state: State, header: Header, group: dist.ProcessGroup) -> None:
    partial = directory.partial_path(final)
    _by_first(group, lambda: directory.begin(final))

    def write_part() -> list[dict[str, Any]]:
        sums, table = storage.write_part(partial, state, group.rank())
        return [directory.as_json(sums), directory.as_json(table)]

    parts = _on_all(group, write_part)

    def publish() -> None:
        sums = {name: FileSum(**entry) for part, _ in parts for name, entry in part.items()}
        table = storage.merged(directory.table_from_json(part) for _, part in parts)
        directory.publish(partial, final, header, sums, table)

    _by_first(group, publish)


def read_current_manifest(checkpoint: Path) -> directory.Manifest:
    """Read the manifest. Raises CheckpointError as `directory.read_manifest`, and for an older format."""
    manifest = directory.read_manifest(checkpoint)
    if manifest.format != directory.FORMAT:
        raise CheckpointError(
            f"{checkpoint}: expected format {directory.FORMAT}, found {manifest.format}, which an older lgaf "
            f"wrote; convert it with `lgaf checkpoint convert {checkpoint}`, or pass the run directory to "
            "convert all of its checkpoints"
        )
    return manifest


def require_tensors(checkpoint: Path, state: State) -> storage.Table:
    """Return the table of the stored tensors.

    Raises CheckpointError unless the parts in `state` have the names and shapes of the stored ones.
    """
    table = read_current_manifest(checkpoint).tensors
    wanted = {f"{part}.{name}": tuple(tensor.shape) for part, name, tensor in _tensors(state)}
    held = {name: tensor.shape for name, tensor in table.items() if name.split(".")[0] in state}
    faults = [f"{name} is missing" for name in wanted if name not in held]
    faults += [f"{name} is not in this model" for name in held if name not in wanted]
    faults += [
        f"{name} has shape {held[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in held and held[name] != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{checkpoint}: expected the tensors of this model, found another model's: "
            f"{'; '.join(faults[:5])}{more}; use the configuration that the checkpoint was trained with"
        )
    return table
