"""A dataset as arrays: where the bytes of every image lie, and whose image it is.

    catalog = open_catalog(folder)
    catalog.label_N[i], catalog.image(i)

The headers of all records are read in one vectorised pass; records without an image (InsightFace's meta
records) are left out; everything that would make training wrong in general fails here, before a step.
Images are read from the file's memory map, so nothing but the arrays is held.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline import recordio
from data_pipeline.quarantine import BadRecord

# Frame header, image header, and the first entry of an array label.
_HEAD_BYTES = recordio.FRAME_HEADER.size + recordio.IMAGE_HEADER.size + 4
_RECORDS_AT_ONCE = 1 << 18
_HEAD = np.dtype(
    {
        "names": ["magic", "word", "flag", "label", "first_label"],
        "formats": ["<u4", "<u4", "<u4", "<f4", "<f4"],
        "offsets": [0, 4, 8, 12, 32],
        "itemsize": _HEAD_BYTES,
    }
)


class DatasetError(ValueError):
    """The dataset as a whole cannot be trained on; names the file, what was expected and what to do."""


@dataclass(frozen=True)
class Catalog:
    """The N images of a dataset.

    `offset_N`, `length_N` (bytes, frames included), `label_N` and `key_N` are int64; labels are in
    [0, num_classes).
    """

    rec_path: Path
    data: np.memmap
    offset_N: np.ndarray
    length_N: np.ndarray
    label_N: np.ndarray
    key_N: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.offset_N)

    @cached_property
    def identity(self) -> dict[str, int]:
        """What tells one dataset from another, wherever it lies."""
        labels = zlib.crc32(self.label_N.tobytes())
        return {"images": len(self), "classes": self.num_classes, "labels_crc32": labels}

    def image(self, record: int) -> np.ndarray:
        """The encoded image of one record: uint8, a view of the file unless the record has several parts."""
        start, length = int(self.offset_N[record]), int(self.length_N[record])
        span = self.data[start : start + length]
        _, word, flag = np.frombuffer(span[:12], "<u4")
        if word >> 29 == recordio.WHOLE:
            head = recordio.FRAME_HEADER.size + recordio.IMAGE_HEADER.size + 4 * int(flag)
            return span[head : recordio.FRAME_HEADER.size + (int(word) & recordio.MAX_LENGTH)]
        payload = recordio.join_frames(span.data, str(self.rec_path), start)
        return np.frombuffer(recordio.unpack(payload, self.name_of(record)).image, np.uint8)

    def name_of(self, record: int) -> str:
        """How messages call a record: file, key and offset."""
        return f"{self.rec_path}: key {self.key_N[record]} at byte {self.offset_N[record]}"

    def bad(self, record: int, reason: str) -> BadRecord:
        """The record's place, for the quarantine's list."""
        return BadRecord(str(self.rec_path), int(self.key_N[record]), int(self.offset_N[record]), reason)


def open_catalog(folder: Path, num_classes: int | None = None) -> Catalog:
    """The catalog of an InsightFace folder (train.rec, train.idx, optionally property).

    `num_classes` overrides what `property` says. Raises DatasetError or RecordError if files are missing,
    do not match each other, are truncated, are not RecordIO, or hold labels outside the classes.
    """
    rec_path, idx_path = _dataset_files(folder)
    data = np.memmap(rec_path, np.uint8, "r")
    key_N, offset_N = recordio.read_index(idx_path)
    length_N = np.diff(offset_N, append=len(data))
    _check_offsets(rec_path, idx_path, key_N, offset_N, len(data))
    label_N, has_image_N = _read_heads(rec_path, data, key_N, offset_N, length_N)
    if not has_image_N.any():
        raise DatasetError(f"{rec_path}: none of its {len(key_N)} records holds an image")
    offset_N, length_N, key_N = offset_N[has_image_N], length_N[has_image_N], key_N[has_image_N]
    label_N = _whole_labels(rec_path, label_N[has_image_N], key_N, offset_N)
    classes = _count_classes(folder, rec_path, label_N, key_N, num_classes)
    return Catalog(rec_path, data, offset_N, length_N, label_N, key_N, classes)


def _dataset_files(folder: Path) -> tuple[Path, Path]:
    rec_path, idx_path = folder / "train.rec", folder / "train.idx"
    if not rec_path.is_file():
        raise DatasetError(
            f"no dataset at {folder}: expected {rec_path}; "
            "set data.path to an InsightFace folder, or write one with `lgaf data synth` or `lgaf data pack`"
        )
    if not idx_path.is_file():
        raise DatasetError(
            f"{idx_path} is missing: it lists where the records of train.rec begin; "
            "copy it from where train.rec came from"
        )
    if rec_path.stat().st_size < recordio.FRAME_HEADER.size:
        raise DatasetError(
            f"{rec_path}: {rec_path.stat().st_size} bytes, too short for one record; copy it anew"
        )
    return rec_path, idx_path


def _check_offsets(
    rec_path: Path, idx_path: Path, key_N: np.ndarray, offset_N: np.ndarray, size_bytes: int
) -> None:
    if offset_N[-1] >= size_bytes:
        raise DatasetError(
            f"{rec_path} ends at byte {size_bytes}, but {idx_path.name} lists key {key_N[-1]} at byte "
            f"{offset_N[-1]}: train.rec is truncated or belongs to another index; copy both anew"
        )
    twice = np.flatnonzero(np.diff(offset_N) == 0)
    if len(twice):
        raise DatasetError(
            f"{idx_path}: keys {key_N[twice[0]]} and {key_N[twice[0] + 1]} "
            f"both lie at byte {offset_N[twice[0]]}"
        )
    first = int(np.frombuffer(np.memmap(rec_path, np.uint8, "r", shape=(4,)), "<u4")[0])
    if first != recordio.MAGIC:
        raise DatasetError(
            f"{rec_path} is not RecordIO: it begins with 0x{first:08x}, expected 0x{recordio.MAGIC:08x}"
        )
    if offset_N[0] != 0:
        raise DatasetError(
            _mismatch(rec_path, idx_path.name, 0, f"its first record lies at byte {offset_N[0]}")
        )


def _mismatch(rec_path: Path, idx_name: str, at: int, found: str) -> str:
    return (
        f"{rec_path} and {idx_name} do not match at byte {at}: {found}; "
        "they come from different datasets or one is damaged; copy both anew"
    )


def _read_heads(
    rec_path: Path, data: np.memmap, key_N: np.ndarray, offset_N: np.ndarray, length_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Label (float64, still unchecked) and presence of an image, for every record of the index."""
    label_N = np.empty(len(key_N), np.float64)
    has_image_N = np.empty(len(key_N), bool)
    within = np.arange(_HEAD_BYTES)
    for start in range(0, len(key_N), _RECORDS_AT_ONCE):
        part = slice(start, start + _RECORDS_AT_ONCE)
        # A record at the very end may be shorter than a head: the bytes read twice there are never used.
        byte_NB = np.minimum(offset_N[part, None] + within, len(data) - 1)
        head_N = np.ascontiguousarray(data[byte_NB]).view(_HEAD)[:, 0]
        payload_N = (head_N["word"] & recordio.MAX_LENGTH).astype(np.int64)
        whole_N = head_N["word"] >> 29 == recordio.WHOLE
        filled_N = recordio.FRAME_HEADER.size + (payload_N + 3 & ~3) == length_N[part]
        label_N[part] = np.where(head_N["flag"] > 0, head_N["first_label"], head_N["label"])
        labels_end_N = recordio.IMAGE_HEADER.size + 4 * head_N["flag"].astype(np.int64)
        has_image_N[part] = payload_N > labels_end_N
        plain_N = (head_N["magic"] == recordio.MAGIC) & whole_N & filled_N & (payload_N >= labels_end_N)
        for i in start + np.flatnonzero(~plain_N):
            label_N[i], has_image_N[i] = _read_slowly(rec_path, data, key_N[i], offset_N[i], length_N[i])
    return label_N, has_image_N


def _read_slowly(
    rec_path: Path, data: np.memmap, key: np.int64, offset: np.int64, length: np.int64
) -> tuple[float, bool]:
    """A record of several parts; or one that is not what the index says, which raises."""
    where = f"{rec_path} (key {key} of train.idx)"
    span = data[int(offset) : int(offset + length)].data
    try:
        record = recordio.unpack(recordio.join_frames(span, where, int(offset)), where)
    except recordio.RecordError as error:
        if offset + length == len(data):
            raise
        raise DatasetError(_mismatch(rec_path, "train.idx", int(offset), f"key {key}: {error}")) from error
    return record.labels[0] if record.labels else 0.0, not record.is_meta


def _whole_labels(rec_path: Path, label_N: np.ndarray, key_N: np.ndarray, offset_N: np.ndarray) -> np.ndarray:
    """Labels as int64; they are stored as float32, in which only whole numbers up to 2^24 are exact."""
    with np.errstate(invalid="ignore"):
        bad_N = ~((label_N >= 0) & (label_N <= recordio.FLOAT32_EXACT) & (label_N == np.floor(label_N)))
    if bad_N.any():
        i = int(np.argmax(bad_N))
        raise DatasetError(
            f"{rec_path}: key {key_N[i]} at byte {offset_N[i]} has label {label_N[i]}, "
            f"expected a whole number from 0 to {recordio.FLOAT32_EXACT} ({int(bad_N.sum())} such records)"
        )
    return label_N.astype(np.int64)


def _count_classes(
    folder: Path, rec_path: Path, label_N: np.ndarray, key_N: np.ndarray, num_classes: int | None
) -> int:
    largest = int(np.argmax(label_N))
    found = f"{rec_path}: key {key_N[largest]} has label {label_N[largest]}"
    if num_classes is not None:
        if label_N[largest] >= num_classes:
            raise DatasetError(
                f"{found}, outside the {num_classes} classes of data.num_classes (0 to {num_classes - 1}); "
                f"set it to at least {label_N[largest] + 1}"
            )
        return num_classes
    said = read_property(folder)
    if said is not None and said[0] != label_N[largest] + 1:
        raise DatasetError(
            f"{folder / 'property'} says {said[0]} classes, but {found}, the largest, so there are "
            f"{label_N[largest] + 1}; correct `property`, or set data.num_classes to say which is meant"
        )
    return int(label_N[largest]) + 1


def read_property(folder: Path) -> tuple[int, int, int] | None:
    """(classes, height, width) as the folder's `property` file says, None where there is none.

    Raises DatasetError if its first line is not three whole numbers.
    """
    path = folder / "property"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    fields = [field.strip() for field in lines[0].split(",")]
    if len(fields) != 3 or not all(field.isdecimal() for field in fields):
        raise DatasetError(f"{path}: first line is {lines[0][:60]!r}, expected 'classes,height,width'")
    return int(fields[0]), int(fields[1]), int(fields[2])
