"""One logical state of a run on disk, whatever the number of ranks that wrote it or will read it.

    save     every tensor under one name, written in parts by all ranks (torch.distributed.checkpoint);
             sums of the bytes taken as they pass; then trainer/checkpoint_files.py makes the folder appear
    newest   the latest checkpoint of a run that is whole, whose files the ranks share out to look at
    load     each rank reads what it needs of one

All three are done by all ranks of a group together, and turn out alike on all of them. Nothing here runs
what a file names: tensors are read with `weights_only`, and the metadata, which torch pickles, through an
unpickler that knows only torch's own checkpoint classes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer import checkpoint_files as files
from trainer.checkpoint_files import CheckpointError, Header
from trainer.summed_files import FileSum, SummedFile, naming_the_cause

_PICKLED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"),
    "pathlib": ("PosixPath", "PurePosixPath"),
}

State = dict[str, dict[str, torch.Tensor]]


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

    Divided tensors are DTensors; the others are the same on all ranks that bring them, and are written once.
    What was begun is removed if it fails: CheckpointError then, on all ranks.
    """
    final = files.final_path(run_dir, header.step)
    partial = files.partial_path(final)
    try:
        _by_first(group, lambda: files.begin(run_dir, header.step))
        sums = _write(partial, state, group)
        _by_first(group, lambda: files.publish(partial, final, header, sums))
    except (CheckpointException, _FirstFailed) as error:
        if dist.get_rank(group) == 0:
            files.clean(run_dir)
        raise CheckpointError(
            f"{final} cannot be written by {_first_cause(error)}; "
            "see that the disk has room and lets itself be written"
        ) from error
    if dist.get_rank(group) == 0:
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
    is_first = dist.get_rank(group) == 0
    found = [files.all_of(run_dir) if is_first else []]
    dist.broadcast_object_list(found, group=group, group_src=0)
    for checkpoint in reversed(found[0]):
        if not checkpoint.is_dir():
            raise ValueError(f"rank 0 goes on from {checkpoint}, which this rank cannot see; share run_dir")
        problem = _agreed_damage(checkpoint, group)
        if problem is None:
            return checkpoint
        if is_first:
            text = f"{problem}; {checkpoint.name} is damaged and passed over"
            print(f"lgaf: {text}", file=sys.stderr, flush=True)
    if found[0]:
        raise CheckpointError(
            f"{files.folder_of(run_dir)}: expected a whole checkpoint, found {len(found[0])}, all damaged; "
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

    Raises CheckpointError if the checkpoint is damaged, or holds tensors of other names or shapes for any of
    the parts that `state` has.
    """
    reader = _Reader(checkpoint)
    _check_names_and_shapes(checkpoint, state, reader.read_metadata())
    try:
        dcp.load(state, storage_reader=reader, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(
            f"{checkpoint}: a part of it cannot be read by {_first_cause(error)}; "
            "`lgaf checkpoint verify` tells whether it is damaged"
        ) from error


class _FirstFailed(Exception):  # noqa: N818
    """What rank 0 does for all has failed; known to all ranks."""


def _by_first(group: dist.ProcessGroup, act: Callable[[], object]) -> None:
    """Let rank 0 act. Raises _FirstFailed on all ranks if its file system does not let it."""
    problem: list[str | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            act()
        except OSError as error:
            problem = [f"rank 0: {error}"]
    dist.broadcast_object_list(problem, group=group, group_src=0)
    if problem[0] is not None:
        raise _FirstFailed(problem[0])


def _first_cause(error: CheckpointException | _FirstFailed) -> str:
    """Which rank failed, and why; torch's exception (a BaseException) holds what was raised on each."""
    if isinstance(error, _FirstFailed):
        return str(error)
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _agreed_damage(checkpoint: Path, group: dist.ProcessGroup) -> str | None:
    """What any rank finds wrong with its share of the files; sizes first, which are quickly seen."""
    for look in (files.wrong_size, files.wrong_sum):
        found: list[str | None] = [None] * dist.get_world_size(group)
        mine = look(checkpoint, dist.get_rank(group), dist.get_world_size(group))
        dist.all_gather_object(found, mine, group=group)
        for problem in found:
            if problem is not None:
                return problem
    return None


def versions() -> dict[str, str]:
    """Versions of what computes, to be kept with results."""
    names = ("lgaf", "torch", "deepspeed", "nvidia-dali-cuda130", "numpy")
    return {name: version(name) for name in names}


def _tensors(state: State) -> Iterator[tuple[str, str, torch.Tensor]]:
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            yield part, name, tensor


def _write(folder: Path, state: State, group: dist.ProcessGroup) -> dict[str, FileSum]:
    """Write the tensors, until they are on the disk; the sums of all ranks' files, on rank 0."""
    # No copies ahead of the writing: what is saved lies in host memory already.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.fs = summing = _SummingFileSystem()
    with _no_sums_by_torch():
        dcp.save(state, storage_writer=writer, process_group=group)
    is_first = dist.get_rank(group) == 0
    gathered: list[dict[str, FileSum]] | None = [{}] * dist.get_world_size(group) if is_first else None
    dist.gather_object(summing.sums, gathered, group=group, group_dst=0)
    return {name: entry for sums in gathered or [] for name, entry in sums.items()}


@contextlib.contextmanager
def _no_sums_by_torch() -> Iterator[None]:
    """torch.save would sum every tensor a second time, for a zip archive's entry that nothing looks at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _SummingFileSystem(FileSystem):
    """torch's file system, which remembers the sums of the files that were written through it, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a file; what is written to it is summed."""
        with open(path, mode) as raw:
            stream = SummedFile(cast(BinaryIO, raw))
            with naming_the_cause():
                yield stream
        self.sums[Path(path).name] = stream.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, and what is known of it."""
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


def _check_names_and_shapes(checkpoint: Path, state: State, metadata: Metadata) -> None:
    wanted = {f"{part}.{name}": tuple(t.shape) for part, group in state.items() for name, t in group.items()}
    held = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.split(".")[0] in state
    }
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


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _PICKLED.get(module, ()):
            raise pickle.UnpicklingError(f"the forbidden global {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, but for the metadata, which torch would unpickle whatever it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises CheckpointError if the metadata is missing, damaged, or not of torch's classes."""
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _unpickle(file)
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise CheckpointError(f"{path}: expected a checkpoint's metadata, found: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _unpickle(file: BinaryIO) -> Metadata:
    content = _MetadataUnpickler(file).load()
    if not isinstance(content, Metadata):
        raise pickle.UnpicklingError(f"a {type(content).__name__}")
    return content
