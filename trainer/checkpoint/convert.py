"""Checkpoints of format 1, whose tensors a pickle of torch's describes, rewritten in the present format.

What that pickle names is never looked up: its unpickler has constructors of its own for the few classes that
torch wrote, under any Python, and those only keep what they are given. The tensors, archives of torch.save
inside *.distcp files, are read with `weights_only`.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from trainer.checkpoint import directory as files
from trainer.checkpoint import storage
from trainer.checkpoint.checksummed_file import FileSum, SummedFile, open_regular
from trainer.checkpoint.directory import CheckpointError, Chunk, StoredTensor

_METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
# Not needed: memory formats (which early releases of Python 3.11 name through getattr), layouts, paths.
_IGNORED = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("builtins", "getattr"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "PurePosixPath"),
}


class _OldChunk(NamedTuple):
    """Where a chunk of a tensor is in the files of format 1, and its rows."""

    tensor: str
    start: int
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def convert(checkpoint: Path) -> None:
    """Replace a checkpoint of format 1 by the same in the present format; a kill leaves one of the two.

    Raises CheckpointError if the checkpoint is damaged or something else than torch has written it.
    """
    manifest = files.read_manifest(checkpoint)
    problem = files.damage(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{problem}; the checkpoint is damaged and is left as it is")
    partial = files.begin(checkpoint)
    try:
        shapes, chunks = _described(checkpoint / _METADATA)
        sums: dict[str, FileSum] = {}
        tables: list[storage.Table] = []
        for name, of_file in chunks.items():
            if name not in manifest.files:
                raise ValueError(f"its metadata names the file {name!r}, which the manifest does not")
            out = f"rank-{len(sums)}.bin"
            with open_regular(checkpoint / name) as source, open(partial / out, "xb") as raw:
                target = SummedFile(cast(BinaryIO, raw))
                tables += [_copy(source, target, out, chunk, shapes[chunk.tensor]) for chunk in of_file]
                os.fsync(target.fileno())
                target.close()
            sums[out] = target.sum
        files.publish(partial, checkpoint, manifest.header, sums, storage.merged(tables))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:  # a crafted pickle or archive can raise nearly anything
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of format 1, as torch writes them, found: {error}; it "
            "is left as it is"
        ) from error


def _copy(
    source: io.FileIO, target: SummedFile, out: str, chunk: _OldChunk, shape: tuple[int, ...]
) -> storage.Table:
    source.seek(chunk.offset)
    content = io.BytesIO(source.read(chunk.length))
    tensor = torch.load(content, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.shape:
        raise ValueError(f"a chunk of {chunk.tensor} that is no tensor of shape {chunk.shape}")
    where = Chunk(chunk.start, chunk.shape[0] if chunk.shape else 1, out, target.tell(), tensor.nbytes)
    storage.write_tensor(target, tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {chunk.tensor: StoredTensor(dtype, shape, (where,))}


def _described(metadata: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_OldChunk]]]:
    """The shape of every tensor, and the chunks in every file, in the order of their bytes."""
    with open_regular(metadata) as file:
        content = _Unpickler(io.BytesIO(file.readall())).load()
    shapes, sizes = {}, {}
    for name, entry in content["state_dict_metadata"].items():
        shapes[name] = _counts(entry["size"])
        for chunk in entry["chunks"]:
            sizes[name, _counts(chunk["offsets"])] = _counts(chunk["sizes"])
    chunks: dict[str, list[_OldChunk]] = defaultdict(list)
    for index, info in content["storage_data"].items():
        offsets = _counts(index["offset"])
        if any(offsets[1:]):
            raise ValueError(f"{index['fqn']} is divided otherwise than by rows")
        [offset, length] = _counts((info["offset"], info["length"]))
        found = _OldChunk(
            index["fqn"],
            offsets[0] if offsets else 0,
            sizes[index["fqn"], offsets],
            info["relative_path"],
            offset,
            length,
        )
        chunks[found.file].append(found)
    return shapes, {name: sorted(of_file, key=lambda chunk: chunk.offset) for name, of_file in chunks.items()}


def _counts(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"sizes or offsets {values!r}")
    return tuple(values)


class _Unpickler(pickle.Unpickler):
    """Builds what torch's metadata describes from constructors of this module, never from what it names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor made for this one place: what a pickle does to it has no other effect."""
        if name in _CLASSES.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) in _IGNORED:
            return lambda *arguments: None
        if (module, name) == ("torch", "Size"):
            return lambda values: tuple(values)
        if module == "torch" and name in files.ITEM_BYTES:
            return name
        raise pickle.UnpicklingError(f"the forbidden global {module}.{name}")


class _Record:
    """An object of torch's, by its fields."""

    def __init__(self) -> None:
        self._fields: Any = {}

    def __setstate__(self, state: Any) -> None:
        self._fields = state

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]
