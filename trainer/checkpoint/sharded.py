"""One logical state of a run on disk, whatever the number of ranks that wrote it or will read it.

    save     each rank writes its part of every tensor, with a sum of the bytes taken as they pass
             (trainer/checkpoint/storage.py); then trainer/checkpoint/directory.py makes the folder appear
    newest   the latest checkpoint of a run that is whole, whose files the ranks share out to look at
    load     each rank reads what it needs of one

All three are done by all ranks of a group together, and turn out alike on all of them. Nothing here runs
what a file names: tensors are bytes, and all that describes them is the JSON of the manifest.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.checkpoint import directory as files
from trainer.checkpoint import storage
from trainer.checkpoint.checksummed_file import FileSum
from trainer.checkpoint.directory import CheckpointError, Header
from trainer.checkpoint.storage import State
from trainer.runtime.ranks import from_first, gather_json


def backbone_state(model: nn.Module) -> State:
    """The parts of a checkpoint that are the network itself, on the live memory of `model`.

    Frozen parameters are constants of the architecture and are not kept.
    """
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {"backbone_weight": weights, "backbone_buffer": dict(model.named_buffers())}


def share_out(state: State, rank: int, size: int) -> State:
    """What one of `size` ranks is to copy and write: its rows of divided tensors, and some of the others.

    Tensors that all ranks hold are dealt out, large ones first, each to the rank that has least so far.
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
    """Write a checkpoint, then remove all but the `keep` newest that are whole, and multiples.

    Each rank brings its part as `share_out` deals it: its rows of divided tensors, which are DTensors, and
    others that no other rank brings. If it fails, what was begun is removed and all ranks raise
    CheckpointError.
    """
    final = files.final_path(run_dir, header.step)
    try:
        _write(final, state, header, group)
    except _RankFailed as error:
        if group.rank() == 0:
            files.clean(run_dir)
        raise CheckpointError(
            f"{final} cannot be written by {error}; see that the disk has room and lets itself be written"
        ) from error
    if group.rank() == 0:
        # The checkpoint stands; if there is trouble with the disk, the next one tells.
        with contextlib.suppress(OSError):
            for old in files.superfluous(
                run_dir,
                keep=keep,
                every_steps=keep_every_steps,
                look=files.wrong_size,
                until_step=header.step,
            ):
                files.remove(old)
    return final


def newest(run_dir: Path, *, group: dist.ProcessGroup) -> Path | None:
    """The latest whole checkpoint of a run, None if it has none at all.

    Every damaged one that is passed over is named once, on standard error, and left as it is.

    Raises CheckpointError if there are some and none is whole, ValueError on a rank that does not see them.
    """
    names = from_first([path.name for path in files.all_of(run_dir)] if group.rank() == 0 else [], group)
    for name in reversed(names):
        checkpoint = files.folder_of(run_dir) / name
        if not checkpoint.is_dir():
            raise ValueError(f"rank 0 goes on from {checkpoint}, which this rank cannot see; share run_dir")
        problem = _agreed_damage(checkpoint, group)
        if problem is None:
            return checkpoint
        if group.rank() == 0:
            text = f"{problem}; {checkpoint.name} is damaged and passed over"
            print(f"lgaf: {text}", file=sys.stderr, flush=True)
    if names:
        raise CheckpointError(
            f"{files.folder_of(run_dir)}: expected a whole checkpoint, found {len(names)}, all damaged; "
            "put a copy of one there, or move the folder away to begin anew"
        )
    return None


def locate(path: Path, *, group: dist.ProcessGroup) -> Path:
    """The checkpoint meant by a path: itself, or the newest whole one of a run directory.

    Raises CheckpointError if there is none, or if it is damaged.
    """
    if files.is_checkpoint(path):
        problem = _agreed_damage(path, group)
        if problem is not None:
            raise CheckpointError(f"{problem}; the checkpoint is damaged, use another")
        return path
    found = newest(path, group=group)
    if found is None:
        raise CheckpointError(
            f"{path}: expected a checkpoint (a folder with {files.MANIFEST}) or a run directory that holds "
            f"some in {files.folder_of(path)}, found none"
        )
    return found


def load(checkpoint: Path, state: State, *, group: dist.ProcessGroup) -> None:
    """Fill the tensors of `state` in place, all ranks together; each rank reads only its parts.

    Raises CheckpointError if the checkpoint is damaged or of an older format, or holds tensors of other names
    or shapes for any of the parts that `state` has.
    """
    manifest = files.read_manifest(checkpoint)
    if manifest.format != files.FORMAT:
        raise CheckpointError(
            f"{checkpoint} is of format {manifest.format}, expected {files.FORMAT}: an older lgaf wrote it; "
            f"rewrite it with `lgaf checkpoint convert {checkpoint}`, or all of a run by the run's directory"
        )
    _check_names_and_shapes(checkpoint, state, manifest.tensors)
    try:
        _on_all(group, lambda: storage.read(checkpoint, state, manifest.tensors))
    except _RankFailed as error:
        raise CheckpointError(
            f"{checkpoint}: a part of it cannot be read by {error}; "
            "`lgaf checkpoint verify` tells whether it is damaged"
        ) from error


class _RankFailed(Exception):  # noqa: N818
    """What a rank does for all has failed: which rank and why; known to all ranks."""


def _on_all(group: dist.ProcessGroup, act: Callable[[], Any]) -> list[Any]:
    """Let every rank act, and return what each returned, which JSON must take.

    Raises _RankFailed on all ranks if one fails: no rank waits for another that is gone.
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
    """Let rank 0 act. Raises _RankFailed on all ranks if it fails."""

    def act_on_first() -> None:
        if group.rank() == 0:
            act()

    _on_all(group, act_on_first)


def _agreed_damage(checkpoint: Path, group: dist.ProcessGroup) -> str | None:
    """What any rank finds wrong with its share of the files; sizes first, which are quickly seen."""
    for look in (files.wrong_size, files.wrong_sum):
        for problem in gather_json(look(checkpoint, group.rank(), group.size()), group):
            if problem is not None:
                return str(problem)
    return None


def versions() -> dict[str, str]:
    """Versions of what computes, to be kept with results."""
    names = ("lgaf", "torch", "deepspeed", "nvidia-dali-cuda130", "numpy")
    return {name: version(name) for name in names}


def _tensors(state: State) -> Iterator[tuple[str, str, torch.Tensor]]:
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            yield part, name, tensor


def _write(final: Path, state: State, header: Header, group: dist.ProcessGroup) -> None:
    partial = files.partial_path(final)
    _by_first(group, lambda: files.begin(final))

    def write_part() -> list[dict[str, Any]]:
        sums, table = storage.write_part(partial, state, group.rank())
        return [files.as_json(sums), files.as_json(table)]

    parts = _on_all(group, write_part)

    def publish() -> None:
        sums = {name: FileSum(**entry) for part, _ in parts for name, entry in part.items()}
        table = storage.merged(files.table_from_json(part) for _, part in parts)
        files.publish(partial, final, header, sums, table)

    _by_first(group, publish)


def _check_names_and_shapes(checkpoint: Path, state: State, table: storage.Table) -> None:
    wanted = {f"{part}.{name}": tuple(tensor.shape) for part, name, tensor in _tensors(state)}
    held = {name: tensor.shape for name, tensor in table.items() if name.split(".")[0] in state}
    faults = [f"{name} is missing" for name in wanted if name not in held]
    faults += [f"{name} is not of this model" for name in held if name not in wanted]
    faults += [
        f"{name} has shape {held[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in held and held[name] != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(faults[:5])}{more}; "
            "use the configuration it was trained with"
        )
