"""RecordIO: reading and writing of frames, of the header of image records, and of the index.

A file is a sequence of records. A record is one frame, or several if its payload contains the frame
magic at a multiple of four bytes: the writer splits there and drops the magic, the reader restores it.

    frame   = u32 magic | u32 (3 bits part, 29 bits length) | payload | zeros up to 4 bytes
    payload = IRHeader (24 bytes) | flag x float32 labels | encoded image
    .idx    = one "key<TAB>offset" line per record

Source: the readers and writers of dmlc-core (recordio.h) and MXNet (recordio.py), read as descriptions.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from data_pipeline.common import tables
from data_pipeline.common.atomic_write import close_if_possible, private_file
from data_pipeline.formats.container import RecordError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
FRAME_HEADER = struct.Struct("<II")
FRAME_AND_FLAG = struct.Struct("<III")
IMAGE_HEADER = struct.Struct("<IfQQ")
MAX_LENGTH = (1 << 29) - 1
WHOLE, START, MIDDLE, END = range(4)

# The largest integer below which every integer is exact in float32, the type of a stored label.
FLOAT32_EXACT = 1 << 24


@dataclass(frozen=True)
class ImageRecord:
    """One unpacked record. `labels` has one entry (stored as a scalar) or several (stored as an array)."""

    labels: tuple[float, ...]
    key: int
    image: bytes

    @property
    def is_meta(self) -> bool:
        """True for InsightFace's index records (key 0 and the identities), which have no image."""
        return not self.image


def pad4(length: int) -> int:
    """Return `length` rounded up to a multiple of four bytes."""
    return (length + 3) & ~3


def frame(payload: bytes) -> bytes:
    """Return the bytes of one record: a single frame, or several if the payload contains the magic.

    Raises ValueError if a part is longer than the 29 bits of the length field.
    """
    cuts = _aligned_magics(payload)
    parts = [
        payload[start:end]
        for start, end in zip([0, *[c + 4 for c in cuts]], [*cuts, len(payload)], strict=True)
    ]
    out = bytearray()
    for i, part in enumerate(parts):
        if len(part) > MAX_LENGTH:
            raise ValueError(f"a record part of {len(part)} bytes: RecordIO holds at most {MAX_LENGTH}")
        is_first, is_last = i == 0, i == len(parts) - 1
        kind = {(True, True): WHOLE, (True, False): START, (False, False): MIDDLE, (False, True): END}[
            is_first, is_last
        ]
        out += FRAME_HEADER.pack(MAGIC, kind << 29 | len(part)) + part + bytes(pad4(len(part)) - len(part))
    return bytes(out)


def _aligned_magics(payload: bytes) -> list[int]:
    """Return the offsets of the magic at multiples of four; the format escapes only those."""
    found, at = [], payload.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            found.append(at)
        at = payload.find(MAGIC_BYTES, at + (4 if at % 4 == 0 else 1))
    return found


def walk_frames(data: bytes | memoryview, where: str, base: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield (kind, payload start, payload end) of the frames in `data`, found at byte `base` of `where`."""
    at = 0
    while at < len(data):
        if len(data) - at < FRAME_HEADER.size:
            raise RecordError(
                f"{where}: truncated at byte {base + at}: "
                f"a frame header has 8 bytes, {len(data) - at} are left"
            )
        magic, word = FRAME_HEADER.unpack_from(data, at)
        if magic != MAGIC:
            raise RecordError(
                f"{where}: no RecordIO frame at byte {base + at}: "
                f"expected magic 0x{MAGIC:08x}, found 0x{magic:08x}"
            )
        kind, length = word >> 29, word & MAX_LENGTH
        if kind > END:
            raise RecordError(f"{where}: frame at byte {base + at} has part kind {kind}, expected 0 to 3")
        start = at + FRAME_HEADER.size
        if start + length > len(data):
            raise RecordError(
                f"{where}: truncated: the frame at byte {base + at} needs {length} bytes, "
                f"{len(data) - start} are left"
            )
        yield kind, start, start + length
        at = start + pad4(length)


def join_frames(span: bytes | memoryview, where: str, base: int = 0) -> bytes:
    """Return the payload of the one record whose frames fill `span`.

    Raises RecordError if the span is not exactly one record.
    """
    parts: list[bytes] = []
    done = False
    for kind, start, end in walk_frames(span, where, base):
        in_order = kind in (WHOLE, START) if not parts else kind in (MIDDLE, END)
        if done or not in_order:
            raise RecordError(f"{where}: frame at byte {base + start - 8} has part kind {kind} out of order")
        parts.append(bytes(span[start:end]))
        done = kind in (WHOLE, END)
    if not done:
        raise RecordError(f"{where}: the record at byte {base} ends before its last part")
    return MAGIC_BYTES.join(parts)


def pack(labels: float | tuple[float, ...], key: int, image: bytes) -> bytes:
    """Return the payload of an image record; a number becomes a scalar label (flag 0), a tuple an array.

    Raises ValueError for a whole-number label that float32 cannot hold exactly.
    """
    values = labels if isinstance(labels, tuple) else (labels,)
    for value in values:
        if float(np.float32(value)) != value and float(value).is_integer():
            raise ValueError(
                f"label {int(value)} of key {key} is above {FLOAT32_EXACT} and not exact in float32, "
                "in which RecordIO stores labels; keep such labels in an integer sidecar"
            )
    if isinstance(labels, tuple):
        return IMAGE_HEADER.pack(len(labels), 0.0, key, 0) + np.asarray(labels, "<f4").tobytes() + image
    return IMAGE_HEADER.pack(0, labels, key, 0) + image


def unpack(payload: bytes, where: str) -> ImageRecord:
    """Split a payload into labels, key and image. Raises RecordError if it is too short for its header."""
    begin = image_begin(payload, where)
    flag, label, key, _ = IMAGE_HEADER.unpack_from(payload)
    labels = (label,) if flag == 0 else tuple(np.frombuffer(payload, "<f4", flag, IMAGE_HEADER.size).tolist())
    return ImageRecord(labels, key, payload[begin:])


def image_begin(payload: bytes, where: str) -> int:
    """Return the offset of the image in a payload. Raises RecordError if it is too short for its header."""
    if len(payload) < IMAGE_HEADER.size:
        raise RecordError(
            f"{where}: an image record has a {IMAGE_HEADER.size}-byte header, this one {len(payload)} bytes"
        )
    flag, *_ = IMAGE_HEADER.unpack_from(payload)
    begin = IMAGE_HEADER.size + 4 * flag
    if begin > len(payload):
        raise RecordError(
            f"{where}: the header announces {flag} labels, but the record has only {len(payload)} bytes"
        )
    return begin


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and offsets of an `.idx`, both int64, in the order of the offsets.

    Raises RecordError, which names the first line that is not `key<TAB>offset`.
    """
    try:
        key_N, offset_N = tables.read_columns(path, 2, "'key<TAB>offset' in whole numbers")
    except tables.TableError as error:
        raise RecordError(f"{path}: {error}") from error
    if (offset_N[1:] >= offset_N[:-1]).all():
        return key_N, offset_N
    order = np.argsort(offset_N, kind="stable")
    return key_N[order], offset_N[order]


class RecordWriter:
    """Writes `PREFIX.rec` and `PREFIX.idx`; both get their names only when they are complete.

    The writer is a context manager: an exception inside it removes both files.
    """

    def __init__(self, rec_path: Path) -> None:
        with contextlib.ExitStack() as stack:
            idx = stack.enter_context(private_file(rec_path.with_suffix(".idx")))
            rec = stack.enter_context(private_file(rec_path))
            self._rec, self._idx = open(rec, "wb"), open(idx, "w", encoding="ascii")
            for file in (self._rec, self._idx):
                stack.callback(close_if_possible, file)
            # Closes both files; then names them, or removes them after an exception.
            self._files = stack.pop_all()

    def write(self, key: int, payload: bytes) -> None:
        """Append one record under `key`."""
        self._idx.write(f"{key}\t{self._rec.tell()}\n")
        self._rec.write(frame(payload))

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            # Both files are on the disk before either of them gets its name.
            for file in (self._rec, self._idx):
                file.flush()
                os.fsync(file.fileno())
