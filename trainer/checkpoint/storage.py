"""The bytes of a checkpoint's tensors: each rank writes one file, and reads the rows that it needs from all.

    write_part    this rank's part of a state -> FOLDER/rank-N.bin, its checksum, and a table of its tensors
    merged        the tables of all ranks -> one table for the manifest
    read          the rows that a state needs, located by the manifest's table -> its tensors

torch's planner decides which rows a rank writes and reads. The files hold only elements of tensors, with no
pickle or other container format.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from trainer.checkpoint.checksummed_file import FileSum, SummedFile, open_regular
from trainer.checkpoint.directory import Chunk, StoredTensor

# The most bytes read at a time: a chunk can be as large as a rank's part of the head.
_PIECE_BYTES = 64 << 20

State = dict[str, dict[str, torch.Tensor]]
Table = dict[str, StoredTensor]


def write_part(folder: Path, state: State, rank: int) -> tuple[dict[str, FileSum], Table]:
    """Write this rank's tensors, which are on the CPU, to one file and flush it to the disk.

    Return the checksum of the file by its name, and the table of the tensors with this rank's chunks only. A
    rank without tensors writes no file. Raises OSError.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    items = planner.create_local_plan().items
    if not items:
        return {}, {}
    name, table = f"rank-{rank}.bin", {}
    with new_file(folder / name) as file:
        for item in items:
            assert item.tensor_data is not None
            tensor = cast(torch.Tensor, planner.resolve_data(item))
            start = _first_row(item.tensor_data.chunk.offsets)
            table[item.index.fqn] = append(file, name, tensor, start, tuple(item.tensor_data.size))
    return {name: file.sum}, table


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[SummedFile]:
    """Open a new file, whose bytes are on the disk when the block is left. Raises OSError."""
    with open(path, "xb") as raw:
        file = SummedFile(cast(BinaryIO, raw))
        yield file
        os.fsync(file.fileno())
        file.close()


def append(
    file: SummedFile, name: str, tensor: torch.Tensor, start: int, shape: tuple[int, ...]
) -> StoredTensor:
    """Write the rows `tensor` of a tensor of `shape`, from row `start` on, to the file called `name`.

    The elements are written in row-major order. Return the description of the tensor with this chunk only.
    """
    chunk = Chunk(start, tensor.shape[0] if tensor.ndim else 1, name, file.tell(), tensor.nbytes)
    if tensor.numel():
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return StoredTensor(str(tensor.dtype).removeprefix("torch."), shape, (chunk,))


def merged(tables: Iterable[Table]) -> Table:
    """Return the tables of all ranks as one, with the chunks in the order of their rows.

    Raises ValueError if two ranks describe one tensor differently. The manifest's own check reports rows that
    are missing or stored twice.
    """
    found: Table = {}
    for table in tables:
        for name, part in table.items():
            before = found.get(name, StoredTensor(part.dtype, part.shape, ()))
            if (before.dtype, before.shape) != (part.dtype, part.shape):
                raise ValueError(
                    f"{name} is {part.dtype} {part.shape} on one rank, "
                    f"{before.dtype} {before.shape} on another"
                )
            # A rank can have no rows of a tensor.
            chunks = [chunk for chunk in (*before.chunks, *part.chunks) if chunk.rows]
            found[name] = StoredTensor(
                part.dtype, part.shape, tuple(sorted(chunks, key=lambda chunk: chunk.start))
            )
    return found


def read(folder: Path, state: State, table: Table) -> None:
    """Fill the tensors of `state` in place, reading only the rows they need; the table must have all of them.

    Raises OSError, and EOFError if a file is too short.
    """
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, _metadata(table), is_coordinator=True)
    by_start = {(name, chunk.start): chunk for name, tensor in table.items() for chunk in tensor.chunks}
    by_file: dict[str, list[tuple[Chunk, ReadItem]]] = {}
    for item in planner.finish_plan(planner.create_local_plan()).items:
        offset = item.storage_index.offset
        chunk = by_start[item.storage_index.fqn, offset[0] if offset else 0]
        by_file.setdefault(chunk.file, []).append((chunk, item))
    for name, wanted in by_file.items():
        with open_regular(folder / name) as file:
            for chunk, item in sorted(wanted, key=lambda pair: pair[0].offset):
                target = planner.resolve_tensor(item).detach()
                row = _first_row(item.storage_offsets)
                tensor = table[item.storage_index.fqn]
                _read_rows(file, chunk.offset + row * tensor.row_bytes, tensor, target)


def _read_rows(file: io.FileIO, offset: int, tensor: StoredTensor, target: torch.Tensor) -> None:
    rows = target.reshape(1) if target.ndim == 0 else target
    step = max(1, _PIECE_BYTES // max(1, tensor.row_bytes))
    file.seek(offset)
    for piece in rows.split(step):
        if piece.numel():
            content = bytearray(len(piece) * tensor.row_bytes)
            read_exactly(file, memoryview(content))
            piece.copy_(torch.frombuffer(content, dtype=getattr(torch, tensor.dtype)).view(piece.shape))


def read_exactly(file: io.FileIO, content: memoryview) -> None:
    """Fill `content` from a file. Raises EOFError if the file ends before."""
    while content:
        count = file.readinto(content)
        if not count:
            raise EOFError(f"expected {len(content)} more bytes, found the end of the file")
        content = content[count:]


def _first_row(offsets: Iterable[int]) -> int:
    """Return the first row of a chunk. Tensors are divided by rows only, so that other offsets are 0."""
    start, *others = [*offsets] or [0]
    assert not any(others)
    return start


def _metadata(table: Table) -> Metadata:
    """Return the table in the form that torch's planner takes."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor.dtype)),
                torch.Size(tensor.shape),
                [_torch_chunk(tensor, chunk) for chunk in tensor.chunks],
            )
            for name, tensor in table.items()
        }
    )


def _torch_chunk(tensor: StoredTensor, chunk: Chunk) -> ChunkStorageMetadata:
    if not tensor.shape:
        return ChunkStorageMetadata(torch.Size(()), torch.Size(()))
    others = tensor.shape[1:]
    return ChunkStorageMetadata(
        torch.Size((chunk.start, *(0 for _ in others))), torch.Size((chunk.rows, *others))
    )
