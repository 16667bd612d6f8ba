"""Conversion of checkpoints of format 1, in which torch's pickle describes tensors, to the current format.

The unpickler never imports the names in that pickle: it has its own constructors for the few classes that
torch writes under any Python version, and they only store their arguments. The tensors are torch.save
archives inside *.distcp files, and are read with `weights_only`.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import pickletools
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from trainer.checkpoint import directory, pt_file, storage
from trainer.checkpoint.checksummed_file import FileSum, SummedFile, open_regular
from trainer.checkpoint.directory import CheckpointError

_METADATA = ".metadata"
_LARGEST_METADATA = 32 << 20
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
# Values that the conversion ignores: memory formats (pickled through getattr by early releases of Python
# 3.11), layouts, paths.
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
    """The rows of a chunk of a tensor, and its place in the files of format 1."""

    tensor: str
    start: int
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def convert(checkpoint: Path) -> None:
    """Replace a checkpoint of format 1 by the same state in the current format.

    If the process is killed, one of the two checkpoints remains. Raises CheckpointError if the checkpoint is
    damaged or was not written by torch.
    """
    checkpoint = checkpoint.resolve()
    manifest = directory.read_manifest(checkpoint)
    problem = directory.damage(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{problem}; the checkpoint is damaged and is left unchanged")
    partial = directory.begin(checkpoint)
    try:
        shapes, chunks = _described(checkpoint / _METADATA)
        sums: dict[str, FileSum] = {}
        tables: list[storage.Table] = []
        for name, of_file in chunks.items():
            if name not in manifest.files:
                raise ValueError(f"metadata with the file {name!r}, which the manifest does not list")
            out = f"rank-{len(sums)}.bin"
            if any(b.offset < a.offset + a.length for a, b in itertools.pairwise(of_file)):
                raise ValueError(f"metadata with overlapping chunks of the file {name!r}")
            with open_regular(checkpoint / name) as source, storage.new_file(partial / out) as target:
                tables += [_copy(source, target, out, chunk, shapes[chunk.tensor]) for chunk in of_file]
            sums[out] = target.sum
        directory.publish(partial, checkpoint, manifest.header, sums, storage.merged(tables))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:  # a crafted pickle or archive can raise nearly anything
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of format 1 as torch writes it, found: {error}; the "
            "checkpoint is left unchanged"
        ) from error


def _copy(
    source: io.FileIO, target: SummedFile, out: str, chunk: _OldChunk, shape: tuple[int, ...]
) -> storage.Table:
    # One read returns less than 2 GiB.
    if chunk.offset + chunk.length > os.fstat(source.fileno()).st_size:
        raise ValueError(f"a chunk of {chunk.tensor} beyond the end of its file")
    content = bytearray(chunk.length)
    source.seek(chunk.offset)
    storage.read_exactly(source, memoryview(content))
    tensor = pt_file.load_bytes(content)
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.shape:
        raise ValueError(f"a chunk of {chunk.tensor} that is not a tensor of shape {chunk.shape}")
    return {chunk.tensor: storage.append(target, out, tensor, chunk.start, shape)}


def _described(metadata: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_OldChunk]]]:
    """Read the shape of every tensor, and the chunks in every file in the order of their offsets."""
    with open_regular(metadata) as file:
        raw = file.read(_LARGEST_METADATA + 1)
    if len(raw) > _LARGEST_METADATA:
        raise ValueError(f"metadata of more than {_LARGEST_METADATA} bytes")
    pt_file.check_structure(pickletools.genops(raw))
    content = _Unpickler(io.BytesIO(raw)).load()
    shapes, sizes = {}, {}
    for name, entry in content["state_dict_metadata"].items():
        shapes[name] = _counts(entry["size"])
        for chunk in entry["chunks"]:
            sizes[name, _counts(chunk["offsets"])] = _counts(chunk["sizes"])
    chunks: dict[str, list[_OldChunk]] = defaultdict(list)
    for index, info in content["storage_data"].items():
        offsets = _counts(index["offset"])
        if any(offsets[1:]):
            raise ValueError(f"{index['fqn']} is sharded along another dimension than its rows")
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
    if not isinstance(values, tuple | list) or not all(type(one) is int and one >= 0 for one in values):
        raise ValueError(f"invalid sizes or offsets {values!r:.80}")
    return tuple(values)


class _Unpickler(pickle._Unpickler):
    """Unpickler of torch's metadata that uses only constructors of this module and imports nothing.

    It is Python's: the one in C reserves gigabytes for an entry of its memo with a high number.
    """

    # This instruction reserves the announced size before it reads, and torch does not write it.
    dispatch: ClassVar = {
        code: call for code, call in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor made for this call; a pickle that modifies it affects nothing else."""
        if name in _CLASSES.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) in _IGNORED:
            return lambda *arguments: None
        if (module, name) == ("torch", "Size"):
            return _counts
        if module == "torch" and name in directory.ITEM_BYTES:
            return name
        raise pickle.UnpicklingError(f"the forbidden global {module}.{name}")


class _Record:
    """The fields of one of torch's objects."""

    def __init__(self) -> None:
        self._fields: Any = {}

    def __setstate__(self, state: Any) -> None:
        self._fields = state

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]
