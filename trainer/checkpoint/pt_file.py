"""Reading of .pt files from any source: no code runs, and no memory beyond the file's size is reserved.

torch.load with `weights_only` executes no code, but it inflates compressed entries, of which a few megabytes
can hold gigabytes, and it accepts calls that reserve any amount of memory. Both are refused beforehand. Views
of a few stored elements can have any shape: tensors far larger than the file are refused before their use.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_pipeline.common.data_file import open_data_file

# The pickle takes about 150 bytes for each tensor.
_LARGEST_PICKLE = 8 << 20
_MOST_VALUES = 1 << 23
_DEEPEST = 100
# Instructions that extend an object, and instructions that could repeat one without its number.
_GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_COPIES = ("DUP", "POP", "POP_MARK")
# Tensors can share storage, for example tied weights.
_MOST_SHARING = 2
_GLOBALS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor(_v2)?|parameter)|"
    r"torch\.nn\.parameter Parameter|torch Size|torch (b?float|u?int|bool|complex)\d*"
)
# A file of the format before torch 1.6 begins with these pickles, of which the fourth describes the tensors.
_OLD_PICKLES = 5
# The last records of an archive without a comment: length and offset of its directory. torch writes both.
_END_64 = struct.Struct("<4s36xQQ4s4xQ4x")
_END = struct.Struct("<4s8xII2s")
_LOCATOR_BYTES = 20
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra fields behind it


def load(path: Path) -> Any:
    """Return the content of a file that torch.save wrote. Its tensors can be maps of the file: copy them.

    Raises OSError if it is not a regular file, and errors of many kinds if it has other content.
    """
    with open_data_file(path) as file:
        is_archive = _check(file)
        size = os.fstat(file.fileno()).st_size
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    _check_tensors(content, size)
    return content


def load_bytes(content: bytearray) -> Any:
    """Return the content of such a file that is in memory. Raises errors of many kinds for other content."""
    file = io.BytesIO(content)
    _check(file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    _check_tensors(loaded, len(content))
    return loaded


def _check(file: BinaryIO) -> bool:
    """Return True for a zip archive, False for the format before torch 1.6. Raises ValueError."""
    is_archive = file.read(4) == b"PK\3\4"
    file.seek(0)
    if is_archive:
        _check_archive(file)
    else:
        for _ in range(_OLD_PICKLES):
            _check_pickle(file)
    return is_archive


def _check_archive(file: BinaryIO) -> None:
    """Raise ValueError unless all entries are stored uncompressed, as torch.save writes them."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_64.size - _END.size))
    end_64, end = file.read(_END_64.size), file.read(_END.size)
    # Python and torch must find the same directory: it ends where the records at the file's end begin.
    start = size - _END.size
    signature, length, offset, comment = _END.unpack(end)
    is_plain = (signature, comment) == (b"PK\5\6", b"\0\0")
    if end_64[-_LOCATOR_BYTES:].startswith(b"PK\6\7"):
        start -= _END_64.size
        signature, length, offset, _, at = _END_64.unpack(end_64)
        is_plain &= (signature, at) == (b"PK\6\6", start)
    if not is_plain or offset + length != start:
        raise ValueError("a zip archive with a comment, or with other bytes between its records")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = sum(entry.file_size for entry in entries)
        if stored > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(
                f"a zip archive of {size} bytes with {stored} bytes of content, compressed or overlapping; "
                "write it again with torch.save"
            )
    for entry in entries:
        if entry.filename.lower().endswith(".pkl"):
            # Not by zipfile, which requires the checksums that torch writes only on request.
            file.seek(entry.header_offset)
            name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name + extra, os.SEEK_CUR)
            _check_pickle(io.BytesIO(file.read(min(entry.file_size, _LARGEST_PICKLE + 1))))


def _check_pickle(file: BinaryIO) -> None:
    """Read one pickle. Raises ValueError if it is too large or uses anything but tensors and plain values."""
    try:
        check_structure(_checked(file))
    except (IndexError, KeyError):
        raise ValueError("a damaged pickle") from None


def _checked(file: BinaryIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    start = file.tell()
    for operation, argument, at in pickletools.genops(file):
        if operation.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"{str(argument).replace(' ', '.'):.80}, expected only tensors and plain values")
        if file.tell() - start > _LARGEST_PICKLE:
            raise ValueError(f"a pickle of more than {_LARGEST_PICKLE} bytes")
        yield operation, argument, at


def check_structure(operations: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> None:
    """Raise ValueError if a pickle's content is deep, or is large when an object is counted at each use.

    Unpicklers hash keys, copy arguments and show objects in errors, each time with all values in them: 60
    levels of tuples, each with twice the one below it, take 2**60 steps. Raises errors of other kinds for a
    damaged pickle.
    """
    stack: list[_Part] = []
    marks: list[int] = []
    memo: dict[Any, _Part] = {}
    values = 0
    for operation, argument, _ in operations:
        values += 1
        if values > _MOST_VALUES:
            raise ValueError(f"a pickle of more than {_MOST_VALUES} values, repeated objects included")
        before = operation.stack_before
        if operation.name in _COPIES:
            raise ValueError(f"a pickle with the instruction {operation.name}, which no Pickler writes here")
        if operation.name == "MARK":
            marks.append(len(stack))
        elif "PUT" in operation.name or operation.name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif "GET" in operation.name:
            stack.append(memo[argument])
            stack[-1].is_reused = True
            values += stack[-1].values
        else:
            is_marked = pickletools.markobject in before
            start = (
                marks.pop() - before.index(pickletools.markobject) if is_marked else len(stack) - len(before)
            )
            taken = stack[start:]
            del stack[start:]
            if not operation.stack_after:
                continue
            if not before and not operation.name.startswith("EMPTY"):
                stack.append(_SCALAR)
                continue
            part = taken.pop(0) if operation.name in _GROWING else _Part()
            if part.is_reused:
                raise ValueError("a pickle that extends an object after its use")
            for one in taken:
                part.values += one.values
                part.depth = max(part.depth, one.depth + 1)
            if part.depth > _DEEPEST:
                raise ValueError(f"a pickle of more than {_DEEPEST} levels")
            stack.append(part)


@dataclass(slots=True)
class _Part:
    """An object that a pickle builds: the number of values in it, and of levels."""

    values: int = 1
    depth: int = 1
    is_reused: bool = False


_SCALAR = _Part(is_reused=True)


def _check_tensors(content: Any, size: int) -> None:
    """Raise ValueError if the tensors in a content have far more bytes than its file of `size` bytes."""
    nbytes, seen, rest = 0, set(), [content]
    while rest:
        one = rest.pop()
        if isinstance(one, torch.Tensor):
            nbytes += math.prod(one.shape) * one.element_size()
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            # A pickle can replace the methods of an OrderedDict.
            rest += dict.values(one) if isinstance(one, dict) else one
    if nbytes > _MOST_SHARING * size:
        raise ValueError(
            f"tensors of {nbytes} bytes in a file of {size} bytes, views of the same elements; "
            "write it again with copies of the tensors"
        )
