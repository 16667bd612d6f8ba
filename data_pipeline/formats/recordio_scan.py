"""A scan for the records of a RecordIO file without its index: one sequential pass, with arrays as result.

    magics -> frames -> frames that follow each other -> records (one frame, or a start, middles and an end)

In this format the frame magic stands at a multiple of four bytes only where a frame begins, because writers
split payloads there. So every such magic is a frame, and each frame must end where the next one begins. If it
does not, the record is damaged, or its writer did not split the payload. The scan continues at the next
frame, so the damage stays limited to one record.

Time and memory grow linearly with the size of the file, whatever its frames state.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.data_file import open_data_file
from data_pipeline.formats import recordio
from data_pipeline.formats.container import DatasetError, Progress
from data_pipeline.formats.recordio import (
    END,
    FRAME_HEADER,
    IMAGE_HEADER,
    MAGIC,
    MAGIC_BYTES,
    MAX_LENGTH,
    MIDDLE,
    START,
    WHOLE,
)

_CHUNK_BYTES = 1 << 24
_LOOK_BYTES = 1 << 20
_HEAD_BYTES = FRAME_HEADER.size + IMAGE_HEADER.size + 4
# Per chunk. Every image record takes more bytes; shorter frames would need more memory than the file has.
_MOST_FRAMES = _CHUNK_BYTES // (FRAME_HEADER.size + IMAGE_HEADER.size)
# Length of the record for a damaged range without a frame header: reading the record reports the damage.
GAP_BYTES = FRAME_HEADER.size
_LABEL = struct.Struct("<f")


class Scan(NamedTuple):
    """The R records of a file in order; each one reaches to the next.

    `offset_R` and `key_R` (from the header) are int64; `label_R` is float32, unchecked; `has_image_R` is
    false for InsightFace's index records; `damaged_R` marks records that cannot be read, and `gap_R` those of
    them that do not begin with a frame. `end` is the end of the last record by its header's length, which is
    the file's size if the file is intact.
    """

    offset_R: np.ndarray
    key_R: np.ndarray
    label_R: np.ndarray
    has_image_R: np.ndarray
    damaged_R: np.ndarray
    gap_R: np.ndarray
    end: int

    def chosen(self, which: np.ndarray) -> Scan:
        """Return the records that `which` selects."""
        *columns, end = self
        return Scan(*(column[which] for column in columns), end)  # type: ignore[call-arg]


class _Frames(NamedTuple):
    """Offset int64, part kind uint8 and payload length; then the image header's fields, if there is one."""

    offset: np.ndarray
    kind: np.ndarray
    length: np.ndarray
    flag: np.ndarray
    label: np.ndarray
    key: np.ndarray

    def end(self) -> np.ndarray:
        return self.offset + FRAME_HEADER.size + (self.length + 3 & ~3)

    def labels_end(self) -> np.ndarray:
        """Return the offset of the image in the payload."""
        return IMAGE_HEADER.size + 4 * self.flag.astype(np.int64)


def require_recordio(path: Path) -> None:
    """Raise DatasetError if there is no frame in the first megabyte of a file."""
    with open_data_file(path) as file:
        head = file.read(_LOOK_BYTES)
    if MAGIC_BYTES not in head:
        raise DatasetError(
            f"{path} is not RecordIO: it begins with 0x{int.from_bytes(head[:4], 'little'):08x}, "
            f"expected 0x{MAGIC:08x}; copy it again, or correct data.path"
        )


def scan(path: Path, progress: Progress) -> Scan:
    """Find all records of a file. Raises DatasetError if there are none, or too many frames for images."""
    with open_data_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        frames = _join_columns(_frames_in_chunks(file.fileno(), path, size, progress))
    if not len(frames.offset):
        raise DatasetError(
            f"{path} is not RecordIO: expected frames at multiples of 4 bytes, found none; copy it again, or "
            "correct data.path"
        )
    follows = frames.end() == np.append(frames.offset[1:], size)
    if frames.offset[0] == 0 and follows.all():
        damaged = is_gap = np.zeros(len(follows), bool)
    else:
        frames, damaged, is_gap = _mend(frames, follows, size)
    return _records(path, frames, damaged, is_gap)


def _join_columns(chunks: Iterator[_Frames]) -> _Frames:
    """Concatenate all chunks, one column at a time, so that only one column is in memory twice."""
    columns = [list(column) for column in zip(*chunks, strict=True)]
    joined = []
    while columns:
        joined.append(np.concatenate(columns.pop(0)))
    return _Frames(*joined)


def _frames_in_chunks(descriptor: int, path: Path, size: int, progress: Progress) -> Iterator[_Frames]:
    """Yield the frames of the file by chunks; each read includes a header that begins at the chunk's end."""
    buffer = np.zeros((_CHUNK_BYTES + _HEAD_BYTES) // 4, np.uint32)
    for start in range(0, size, _CHUNK_BYTES):
        _fill(buffer.view(np.uint8), descriptor, start)
        at = np.flatnonzero(buffer[: _CHUNK_BYTES // 4] == MAGIC)
        if len(at) > _MOST_FRAMES:
            raise DatasetError(
                f"{path}: expected image records, found {len(at)} frames in {_CHUNK_BYTES} bytes from byte "
                f"{start} on, too short for images; copy it again"
            )
        yield _frames_of(buffer, at, start)
        progress(min(start + _CHUNK_BYTES, size), size)


def _fill(buffer: np.ndarray, descriptor: int, start: int) -> None:
    """Fill the buffer from byte `start`; after the end of the file with zeros, which contain no frames."""
    at = 0
    while at < len(buffer) and (got := os.preadv(descriptor, [buffer[at:].data], start + at)):
        at += got
    buffer[at:] = 0


def _frames_of(buffer: np.ndarray, at: np.ndarray, start: int) -> _Frames:
    """Return the frames that begin at the words `at` of the buffer."""
    word, flag, label, first_label = (buffer[at + i] for i in (1, 2, 3, 8))
    return _Frames(
        offset=start + 4 * at,
        kind=(word >> 29).astype(np.uint8),
        length=(word & MAX_LENGTH).astype(np.int32),
        flag=flag,
        label=np.where(flag > 0, first_label, label).view(np.float32),
        key=(buffer[at + 4].astype(np.uint64) | buffer[at + 5].astype(np.uint64) << 32).view(np.int64),
    )


def _mend(frames: _Frames, follows: np.ndarray, size: int) -> tuple[_Frames, np.ndarray, np.ndarray]:
    """Find the damaged one of two frames wherever a frame does not end where the next one begins."""
    count = len(follows)
    keep, damaged = np.ones(count, bool), np.zeros(count, bool)
    begins = np.append(frames.offset, size)
    i_B = np.flatnonzero(~follows)
    end_B = frames.end()[i_B]
    j_B = np.searchsorted(begins, end_B)
    is_at_frame_B = begins[np.minimum(j_B, count)] == end_B
    # The number of frames before the i-th one that are followed by the next one.
    following = np.append(0, np.cumsum(follows))
    is_unsplit_B = is_at_frame_B & (following[np.minimum(j_B, count)] == following[i_B + 1])
    reached = 0
    for i, j in zip(i_B[is_unsplit_B].tolist(), j_B[is_unsplit_B].tolist(), strict=True):
        if i >= reached:
            keep[i + 1 : j] = False  # the writer left these magics in the payload
            reached = j
    is_mended_B = ~keep[i_B] | is_unsplit_B
    is_gap_B = ~is_mended_B & (end_B < begins[i_B + 1])  # the magic of the next frame is damaged
    is_wrong_B = ~is_mended_B & ~is_gap_B & ((end_B <= size) | (i_B + 1 < count))
    damaged[i_B[is_wrong_B]] = True  # its length is wrong
    gaps = np.append([0] * int(begins[0] > 0), end_B[is_gap_B]).astype(np.int64)
    joined = _Frames(*(_with_zeros(column[keep], len(gaps)) for column in frames))
    joined.offset[int(keep.sum()) :] = gaps
    is_gap = np.arange(len(joined.offset)) >= keep.sum()
    order = np.argsort(joined.offset, kind="stable")
    damaged = _with_zeros(damaged[keep], len(gaps)) | is_gap
    return _Frames(*(column[order] for column in joined)), damaged[order], is_gap[order]


def _with_zeros(column: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([column, np.zeros(count, column.dtype)])


def _records(path: Path, frames: _Frames, damaged: np.ndarray, is_gap: np.ndarray) -> Scan:
    labels_end = frames.labels_end()
    has_image = frames.length > labels_end
    is_whole = frames.kind == WHOLE
    damaged = damaged | is_whole & (frames.length < labels_end)
    end = int(frames.offset[-1] if is_gap[-1] else frames.end()[-1])
    found = Scan(frames.offset, frames.key, frames.label, has_image | damaged, damaged, is_gap, end)
    if not is_whole.all():
        starts, damaged = _group(frames, damaged)
        first = np.flatnonzero(starts)
        is_split = frames.kind[first] == START
        has_image[first[is_split]] = True
        # A record that is split inside its labels: only the joined record shows if there is an image.
        slow = np.flatnonzero(is_split & ~damaged[first] & (frames.length[first] < labels_end[first]))
        if len(slow):
            _read_slowly(path, frames, first, slow, has_image, damaged)
        found = found._replace(has_image_R=has_image | damaged, damaged_R=damaged).chosen(starts)
    return found


def _group(frames: _Frames, damaged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which frames begin records, and `damaged` with the records that have wrong parts added."""
    before = np.concatenate([[WHOLE], frames.kind[:-1]])
    continues = (frames.kind == MIDDLE) | (frames.kind == END)
    is_open = (before == START) | (before == MIDDLE)
    starts = ~continues | ~is_open
    record = np.cumsum(starts) - 1
    is_wrong = damaged | (continues & ~is_open) | (frames.kind > END)
    unfinished = np.append(is_open[1:] & ~continues[1:], frames.kind[-1] in (START, MIDDLE))
    per_record = np.zeros(record[-1] + 1, bool)
    per_record[record[is_wrong | unfinished]] = True
    return starts, per_record[record]


def _read_slowly(
    path: Path,
    frames: _Frames,
    first: np.ndarray,
    slow: np.ndarray,
    has_image: np.ndarray,
    damaged: np.ndarray,
) -> None:
    """Correct `frames` and the flags of records whose header or labels are split into several frames.

    `first` are the first frames of all records, `slow` the numbers of such records, whose parts are in order.
    """
    size_R = np.add.reduceat(frames.length + len(MAGIC_BYTES), first, dtype=np.int64) - len(MAGIC_BYTES)
    key_F = frames.key.view(np.uint64)
    with open_data_file(path) as file:
        for frame, size in zip(first[slow].tolist(), size_R[slow].tolist(), strict=True):
            head = _joined_head(file.fileno(), int(frames.offset[frame]))
            flag, label, key, _ = IMAGE_HEADER.unpack_from(head)
            labels_end = IMAGE_HEADER.size + 4 * flag
            if size < labels_end:
                damaged[frame] = True
                continue
            frames.label[frame] = _LABEL.unpack_from(head, IMAGE_HEADER.size)[0] if flag else label
            key_F[frame] = key
            has_image[frame] = size > labels_end


def _joined_head(descriptor: int, start: int) -> bytes:
    """Return the image header and the first label of the record at `start`; zeros, if it is shorter."""
    wanted = IMAGE_HEADER.size + _LABEL.size
    # Each part of a record adds its magic of four bytes, or is its last part.
    span = os.pread(descriptor, wanted + wanted // 4 * (FRAME_HEADER.size + 3), start)
    head, at = b"", 0
    while len(head) < wanted and len(span) - at >= FRAME_HEADER.size:
        _, word = FRAME_HEADER.unpack_from(span, at)
        begin = at + FRAME_HEADER.size
        head += span[begin : begin + (word & MAX_LENGTH)] + MAGIC_BYTES
        at = begin + recordio.pad4(word & MAX_LENGTH)
    return head.ljust(wanted, b"\0")
