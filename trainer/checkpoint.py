"""One logical state of a run on disk, whatever the number of ranks that wrote it or will read it.

    run_dir/checkpoints/step-00001000/
        *.distcp, .metadata     every tensor under one name, written in parts by all ranks
        checkpoint.json         step, configuration, dataset, versions; written last

A checkpoint is written under a temporary name and renamed when it is complete: a folder called step-N is a
whole checkpoint. Nothing here runs what a file names: tensors are read with `weights_only`, and the metadata,
which torch pickles, through an unpickler that knows only torch's own checkpoint classes.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_HEADER = "checkpoint.json"
_PREFIX = "step-"
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


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; names it and what was expected."""


@dataclass(frozen=True)
class Header:
    """What is known of a checkpoint without reading a tensor."""

    step: int
    config: dict[str, Any]
    dataset: dict[str, int]
    versions: dict[str, str]
    cursor: list[list[int]] | None = None  # of a stream of shards, a row for each rank


def backbone_state(model: nn.Module) -> State:
    """The parts of a checkpoint that are the network itself, on the live memory of `model`.

    Frozen parameters are constants of the architecture and are not kept.
    """
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {"backbone_weight": weights, "backbone_buffer": dict(model.named_buffers())}


def newest(run_dir: Path) -> Path | None:
    """The latest complete checkpoint of a run, None if it has none."""
    found = _complete(run_dir / "checkpoints")
    return found[-1] if found else None


def locate(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of a run directory.

    Raises CheckpointError if there is none.
    """
    if (path / _HEADER).is_file():
        return path
    found = newest(path)
    if found is None:
        raise CheckpointError(
            f"{path}: expected a checkpoint (a folder with {_HEADER}) or a run directory that holds some in "
            f"{path / 'checkpoints'}, found none"
        )
    return found


def read_header(checkpoint: Path) -> Header:
    """Raises CheckpointError if the header is missing or damaged."""
    try:
        return Header(**json.loads((checkpoint / _HEADER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / _HEADER}: expected a checkpoint's header, found: {error}"
        ) from error


def save(run_dir: Path, state: State, header: Header, *, keep: int, group: dist.ProcessGroup) -> Path:
    """Write a checkpoint, all ranks together, then remove all but the `keep` newest.

    Sharded tensors are DTensors; the others are the same on all ranks and are written once.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"{_PREFIX}{header.step:08d}"
    partial = folder / f".{final.name}.part"
    is_first = dist.get_rank(group) == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group)
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(
            f"{partial} cannot be written by {_first_cause(error)}; "
            "see that the disk has room and lets itself be written"
        ) from error
    if is_first:
        _write_through(partial / _HEADER, json.dumps(asdict(header), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(folder)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier(group)
    return final


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
            "remove this folder, and the run goes on from the checkpoint before it"
        ) from error


def _first_cause(error: CheckpointException) -> str:
    """Which rank failed, and why; torch's exception (a BaseException) holds what was raised on each."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def versions() -> dict[str, str]:
    """Versions of what computes, to be kept with results."""
    names = ("lgaf", "torch", "deepspeed", "nvidia-dali-cuda130", "numpy")
    return {name: version(name) for name in names}


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / _HEADER).is_file())


def _write_through(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
