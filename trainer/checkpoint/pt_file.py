"""Reading of .pt files from any source: no code runs, and no memory beyond the file's size is reserved.

torch.load with `weights_only` executes no code, but it inflates compressed entries, of which a few megabytes
can hold gigabytes, and it accepts calls that reserve any amount of memory. Both are refused beforehand.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_pipeline.common.data_file import open_data_file

# The pickle takes about 150 bytes for each tensor.
_LARGEST_PICKLE = 8 << 20
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
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def load_bytes(content: bytearray) -> Any:
    """Return the content of such a file that is in memory. Raises errors of many kinds for other content."""
    file = io.BytesIO(content)
    _check(file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


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
    start = file.tell()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"{str(argument).replace(' ', '.'):.80}, expected only tensors and plain values")
        if file.tell() - start > _LARGEST_PICKLE:
            raise ValueError(f"a pickle of more than {_LARGEST_PICKLE} bytes")
