"""WebDataset shards: uncompressed tar files whose images are read as byte ranges.

A sample is a run of consecutive members with the same key, the name up to the first dot of the base name:

    000042.jpg    the image: jpg, jpeg, png or webp
    000042.cls    the label, an integer in ASCII; or 000042.json, its "label", else its "cls"

The index walks over the headers in a memory map and reads no image. Python's tarfile takes five times as
long, and in 3.11.7 it ends silently at a damaged header and loops forever at a negative size.

Source: POSIX.1-2008, pax interchange format; GNU tar's manual; webdataset's tariterators.py, as descriptions.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import adler32 as _adler

import numpy as np

from data_pipeline.common.data_file import open_data_file
from data_pipeline.formats.container import LARGEST_LABEL, DatasetError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_KINDS = {
    b"jpg": "image",
    b"jpeg": "image",
    b"png": "image",
    b"webp": "image",
    b"cls": "cls",
    b"json": "json",
}

# name, size, checksum, type, magic, and whether ustar continues the name before byte 500
_HEADER = struct.Struct("100s24x12s12x8sc100x6s82x?166x")
_SLASH = ord("/")
_BLANK = 8 * ord(" ")
_POSIX = b"ustar\0"
_FILES, _WITHOUT_DATA, _SPARSE = {b"0", b"\0", b"7"}, {b"1", b"2", b"3", b"4", b"5", b"6"}, b"S"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = b"L", b"K", b"x", b"g"
_EXTENDED_HEADERS = {_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL}
_SPARSE_KEYS = {b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.numblocks"}
_PAX_KEYS = {b"path", b"size", *_SPARSE_KEYS}
_META = re.compile(rb"__[^/]*__($|/)")
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ([^=\n]+)=")
# Limits for the lengths that a damaged or hostile file claims for names and labels.
_LONGEST_HEADER = 1 << 20
# Writers pad an archive to their block size.
_LONGEST_PADDING, _CHUNK = 1 << 26, 1 << 20
_LONGEST_NAME = 4096  # of a path in Linux; a pax header can set one name for all members that follow
_LONGEST_LABEL = {"cls": 64, "json": 1 << 20}

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class ShardError(DatasetError):
    """A tar shard cannot be read as samples; the message names the file, the offset and the remedy."""


class ShardIndex(NamedTuple):
    """The byte ranges of a shard's N images, and their labels; all int64."""

    offset_N: np.ndarray
    length_N: np.ndarray
    label_N: np.ndarray


def index_shard(path: Path) -> ShardIndex:
    """Return the byte ranges and labels of all samples of a shard, in the order of the file.

    Members that are neither image nor label are ignored, and so are samples without both.

    Raises ShardError if the file is missing, compressed, truncated or no tar, or if a sample has no image,
    no label, several of either, or a label that is not an integer.
    """
    try:
        with open_data_file(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ShardError(f"{path}: expected a tar, found an empty file; copy it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _index(data, str(path))
    except FileNotFoundError:
        raise ShardError(f"{path}: expected a tar shard, found no such file; correct its path") from None
    except OSError as error:
        raise ShardError(f"{path}: expected a tar shard, found: {error.strerror}") from error


def _index(data: mmap.mmap, where: str) -> ShardIndex:
    # One flat list of offset, length, label, ...: numpy converts it ten times faster than a list of rows.
    row: list[int] = []
    key, parts = b"", dict[str, tuple[int, int]]()
    for name, start, length in _members(data, where):
        dot = name.find(b".", name.rfind(b"/") + 1)
        if dot <= 0 or name[dot - 1] == _SLASH:
            continue
        if name[:dot] != key:
            _close_sample(data, where, key, parts, row)
            key, parts = name[:dot], {}
        kind = _KINDS.get(name[dot + 1 :].lower())
        if kind is None:
            continue
        if kind in parts:
            raise ShardError(
                f"{where}: sample {_text(key)} has a second {kind} at byte {start}, after the one at byte "
                f"{parts[kind][0]}; give each sample its own key, one image and one label"
            )
        parts[kind] = start, length
    _close_sample(data, where, key, parts, row)
    table_N3 = np.array(row, np.int64).reshape(-1, 3)
    return ShardIndex(*np.ascontiguousarray(table_N3.T))


def _close_sample(
    data: mmap.mmap, where: str, key: bytes, parts: dict[str, tuple[int, int]], row: list[int]
) -> None:
    """Append a sample to `row`; samples with neither image nor .cls are ignored."""
    kind = "cls" if "cls" in parts else "json"
    if "image" in parts and parts["image"][1] and kind in parts:
        start, length = parts[kind]
        text = data[start : start + min(length, _LONGEST_LABEL[kind] + 1)]
        label = label_of_cls(text) if kind == "cls" else label_of_json(text)
        if label is None or len(text) > _LONGEST_LABEL[kind] or not 0 <= label <= LARGEST_LABEL:
            wanted = f"an integer from 0 to {LARGEST_LABEL}"
            wanted += " under 'label' or 'cls'" if kind == "json" else ""
            raise ShardError(
                f"{where}: sample {_text(key)} has the label {_text(text)} at byte {start}, "
                f"expected {wanted}; write it again"
            )
        row += (*parts["image"], label)
    elif "image" in parts or kind == "cls":
        at = min(parts.values())[0]
        has_image = "image" in parts and parts["image"][1]
        lacks = "label (.cls or .json)" if has_image else "image (.jpg, .jpeg, .png or .webp)"
        raise ShardError(
            f"{where}: sample {_text(key)} at byte {at} has no {lacks}; add it, or leave the sample out, and "
            "keep the members of a sample together (`tar --sort=name`)"
        )


def label_of_cls(text: bytes) -> int | None:
    """Return the integer in a sample's .cls; None for any other text."""
    digits = text.strip()
    return int(digits) if digits.isdigit() else None


def label_of_json(text: bytes) -> int | None:
    """Return the integer under "label", else "cls", in a sample's .json; None if there is none."""
    try:
        content = json.loads(text)
    # Deep nesting raises RecursionError; bytes that are not UTF-8 raise UnicodeDecodeError, a ValueError.
    except (ValueError, RecursionError):
        return None
    label = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _text(raw: bytes) -> str:
    """Return bytes of the file as short text for a message."""
    return repr(raw[:80].decode("utf-8", "backslashreplace"))


def _members(data: mmap.mmap, where: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, first byte and length of every regular file in the tar."""
    at, size_bytes = 0, len(data)
    for_all: dict[bytes, bytes] = {}
    pax: dict[bytes, bytes] = {}
    while (head := data[at : at + BLOCK]) != _ZEROS:
        if len(head) < BLOCK:
            raise ShardError(_not_a_header(head, where, at, size_bytes))
        name, size, checksum, kind, magic, is_long = _HEADER.unpack(head)
        if not _fits(head, checksum):
            raise ShardError(_not_a_header(head, where, at, size_bytes))
        start = at + BLOCK
        length = 0 if kind in _WITHOUT_DATA else _length(size, pax, where, at)
        if start + length > size_bytes:
            raise ShardError(
                f"{where}: truncated: the member at byte {at} needs {length} bytes, "
                f"{size_bytes - start} are left; copy it again"
            )
        at = start + (length + BLOCK - 1 & -BLOCK)
        if kind == _SPARSE or (pax and pax.keys() & _SPARSE_KEYS):
            raise ShardError(
                f"{where}: expected members stored as they are, found a sparse one at byte {start}; "
                "write the tar without --sparse"
            )
        if kind in _EXTENDED_HEADERS:
            more = _extended_fields(data, kind, start, length, where)
            for_all = {**for_all, **more} if kind == _PAX_FOR_ALL else for_all
            pax = {**pax, **more}
            continue
        if kind in _FILES:
            name = name.partition(b"\0")[0]
            if is_long and magic == _POSIX:
                name = head[345:500].partition(b"\0")[0] + b"/" + name
            if pax:
                name = pax.get(b"path", name)
            # webdataset ignores members with such names.
            if not (name.startswith(b"__") and _META.match(name)):
                yield name, start, length
        pax = for_all
    _require_end(data, where, at)


def _require_end(data: mmap.mmap, where: str, end: int) -> None:
    """Raise ShardError unless only zeros, a limited number of them, follow the end of the archive."""
    for at in range(end, len(data), _CHUNK):
        if at - end > _LONGEST_PADDING or data[at : at + _CHUNK].strip(b"\0"):
            raise ShardError(
                f"{where}: expected nothing after the end of the archive at byte {end}, found more; do not "
                "concatenate archives, write one archive per shard"
            )


def _extended_fields(data: mmap.mmap, kind: bytes, start: int, length: int, where: str) -> dict[bytes, bytes]:
    """Return the pax fields that an extended header sets for the next member, or for all that follow."""
    if length > _LONGEST_HEADER:
        raise ShardError(
            f"{where}: a name or pax header of {length} bytes at byte {start}, expected at most "
            f"{_LONGEST_HEADER}; the file is damaged, copy it again"
        )
    text = data[start : start + length]
    if kind == _LONG_LINK:
        return {}
    found = {b"path": text.partition(b"\0")[0]} if kind == _LONG_NAME else _pax_records(text, where, start)
    if len(found.get(b"path", b"")) > _LONGEST_NAME:
        raise ShardError(
            f"{where}: a name of {len(found[b'path'])} bytes at byte {start}, expected at most "
            f"{_LONGEST_NAME}; the file is damaged, copy it again"
        )
    return found


def _fits(head: bytes, checksum: bytes) -> bool:
    """Return whether the checksum is the sum of the header's bytes, with its own counted as spaces.

    Adler-32's lower half is one more than the sum of the bytes modulo 65521, many times faster than sum().
    """
    try:
        expected = int(checksum.strip(b" \0"), 8) - _BLANK
    except ValueError:
        return False
    if ((_adler(head) & 0xFFFF) - (_adler(checksum) & 0xFFFF) - expected) % 65521 == 0:
        return True
    # Some old writers summed signed bytes.
    rest = head[:148] + head[156:]
    return int(np.frombuffer(rest, np.int8).sum(dtype=np.int64)) == expected


def _not_a_header(head: bytes, where: str, at: int, size_bytes: int) -> str:
    for signature, name in _COMPRESSED.items():
        if at == 0 and head.startswith(signature):
            return (
                f"{where}: compressed with {name}; images are read as byte ranges of an "
                "uncompressed tar: decompress it (encoded images hardly shrink anyway)"
            )
    if len(head) < BLOCK:
        return (
            f"{where}: truncated at byte {at}: expected a header or the zeros that end a tar, "
            f"{size_bytes - at} bytes are left; copy it again"
        )
    return f"{where}: no tar header at byte {at}: its checksum does not match; copy it again"


def _length(field: bytes, pax: dict[bytes, bytes], where: str, at: int) -> int:
    """Return the size of a member in bytes: from pax, else octal digits, else GNU's binary form."""
    text = pax.get(b"size")
    try:
        if text is not None:
            return int(text) if text.isdigit() and len(text) <= 20 else int("")
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0") or b"0"
        return int(digits, 8) if digits.isdigit() else int("")
    except ValueError:
        raise ShardError(
            f"{where}: the member at byte {at} has the size {_text(text or field)}, expected an integer; "
            "copy it again"
        ) from None


def _pax_records(text: bytes, where: str, at: int) -> dict[bytes, bytes]:
    """Return the used records `LENGTH KEY=VALUE` of a pax header; LENGTH counts the entire record."""
    records, position = {}, 0
    while position < len(text) and text[position]:
        found = _PAX_RECORD.match(text, position)
        end = position + int(found[1]) if found else 0
        if found is None or end > len(text) or end <= found.end() or text[end - 1 : end] != b"\n":
            raise ShardError(
                f"{where}: a pax record at byte {at + position} begins with "
                f"{_text(text[position : position + 20])}, expected 'length key=value'; copy it again"
            )
        if found[2] in _PAX_KEYS:
            records[found[2]] = text[found.end() : end - 1]
        position = end
    return records
