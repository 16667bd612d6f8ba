"""The container for InsightFace folders in all variants: `.rec` files, each with its optional sidecars.

    x.rec          the records: images, and possibly InsightFace's index records, which have no image
    x.idx          the keys; without it a record's key is the id in its header
    x.labels.npy   integer labels, for more than the 2^24 identities that a record's float32 can distinguish
    x.tsv          CVLface's list (key, path, label), whose labels replace those of the records

All files of a folder share their classes. The index is compared with the file: if both are intact and differ,
they come from different datasets, which is an error; a damaged part of the file becomes a damaged record.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.common import tables
from data_pipeline.formats import recordio
from data_pipeline.formats.container import (
    FILE,
    LABEL,
    LARGEST_LABEL,
    LENGTH,
    LONGEST,
    DatasetError,
    FileTable,
    Progress,
    RecordError,
    Records,
    file_names,
    joined,
    table_of,
)
from data_pipeline.formats.int64_labels import LABELS_SUFFIX, read_labels
from data_pipeline.formats.recordio import FLOAT32_EXACT, FRAME_HEADER, IMAGE_HEADER, MAGIC, MAX_LENGTH, WHOLE
from data_pipeline.formats.recordio_scan import GAP_BYTES, Scan, require_recordio, scan

_HEAD_BYTES = FRAME_HEADER.size + IMAGE_HEADER.size


def list_files(folder: Path) -> FileTable | None:
    """Return all `.rec` files and their sidecars; None if the folder has none."""
    names = file_names(folder)
    stems = {name[: -len(".rec")] for name in names if name.endswith(".rec") and not name.startswith(".")}
    if not stems:
        return None
    beside = {stem + suffix for stem in stems for suffix in (".rec", ".idx", ".tsv", LABELS_SUFFIX)}
    return table_of(folder, (name for name in names if name in beside))


def read_records(files: FileTable, progress: Progress) -> Records:
    """Read the records with images of all `.rec` files of the folder.

    Raises DatasetError or RecordError if a file is truncated, is not RecordIO, holds no image, has labels
    that are not classes, or does not match its sidecars.
    """
    names = [files.name(i) for i in range(len(files))]
    chosen = [i for i, name in enumerate(names) if name.endswith(".rec")]
    total, done = int(files.size_F[chosen].sum()), 0
    parts: list[Records] = []
    for file in chosen:

        def report(at: int, _: int, before: int = done) -> None:
            progress(before + at, total)

        parts.append(_read_file(files.path(file), file, set(names), report))
        done += int(files.size_F[file])
    return joined(parts)


def image_of(span: bytes, where: str, offset: int) -> np.ndarray:
    """Return the encoded image uint8 of a record's bytes. Raises RecordError, which begins with `where`."""
    if len(span) > _HEAD_BYTES:
        magic, word, flag = recordio.FRAME_AND_FLAG.unpack_from(span)
        length, begin = word & MAX_LENGTH, _HEAD_BYTES + 4 * flag
        count = FRAME_HEADER.size + length - begin
        is_filled = FRAME_HEADER.size + (length + 3 & ~3) == len(span)
        if magic == MAGIC and word >> 29 == WHOLE and is_filled and count > 0:
            return np.frombuffer(span, np.uint8, count, begin)
    payload = recordio.join_frames(span, where, offset)
    begin = recordio.image_begin(payload, where)
    if begin == len(payload):
        raise RecordError(f"{where}: expected an image, found a record without one")
    return np.frombuffer(payload, np.uint8, offset=begin)


def _read_file(rec_path: Path, file: int, names: set[str], progress: Progress) -> Records:
    size = rec_path.stat().st_size
    if size < FRAME_HEADER.size:
        raise DatasetError(f"{rec_path}: {size} bytes, too short for one record; copy it again")
    require_recordio(rec_path)
    idx_path = rec_path.with_suffix(".idx")
    has_index = idx_path.name in names
    if has_index:
        key_N, offset_N = recordio.read_index(idx_path)
        _check_offsets(rec_path, key_N, offset_N, size)
        found = _with_index(rec_path, scan(rec_path, progress), key_N, offset_N, size)
    else:
        found = scan(rec_path, progress)
    _refuse_truncated(rec_path, found, has_index, size)
    if not found.has_image_R.any():
        raise DatasetError(
            f"{rec_path}: expected images, found none in its {len(found.offset_R)} records; copy it again"
        )
    length_R = np.minimum(np.diff(found.offset_R, append=size), LONGEST).astype(LENGTH)
    length_R[found.gap_R] = np.minimum(length_R[found.gap_R], GAP_BYTES)
    keep_R = found.has_image_R
    if not keep_R.all():
        found = found.chosen(keep_R)
        length_R = length_R[keep_R]
    return Records(
        np.full(len(length_R), file, FILE),
        found.offset_R,
        length_R,
        _labels(rec_path, found, names),
        found.key_R,
        np.flatnonzero(found.damaged_R),
    )


def _check_offsets(rec_path: Path, key_N: np.ndarray, offset_N: np.ndarray, size: int) -> None:
    idx_path = rec_path.with_suffix(".idx")
    if offset_N[-1] >= size:
        raise DatasetError(
            f"{rec_path} ends at byte {size}, but {idx_path.name} lists key {key_N[-1]} at byte "
            f"{offset_N[-1]}: {rec_path.name} is truncated or belongs to another index; copy both again"
        )
    twice = np.flatnonzero(offset_N[1:] == offset_N[:-1])
    if len(twice):
        raise DatasetError(
            f"{idx_path}: expected one key per offset, found the keys {key_N[twice[0]]} and "
            f"{key_N[twice[0] + 1]} at byte {offset_N[twice[0]]}; copy it again"
        )


def _with_index(rec_path: Path, found: Scan, key_N: np.ndarray, offset_N: np.ndarray, size: int) -> Scan:
    """Return the records that the index lists. Raises DatasetError if it contradicts intact records."""
    if np.array_equal(found.offset_R, offset_N):
        return found._replace(key_R=key_N)
    at_R = np.minimum(np.searchsorted(offset_N, found.offset_R), len(offset_N) - 1)
    is_unlisted_R = (offset_N[at_R] != found.offset_R) & ~found.damaged_R
    if is_unlisted_R.any():
        first = int(found.offset_R[np.argmax(is_unlisted_R)])
        before = int(np.searchsorted(offset_N, first)) - 1
        what = (
            f"in the index, the first record lies at byte {offset_N[0]}"
            if before < 0
            else f"the index lacks the record that begins there, after the one of key {key_N[before]}"
        )
        raise DatasetError(_mismatch(rec_path, first, what))
    within_N = np.searchsorted(found.offset_R, offset_N, side="right") - 1
    is_found_N = (within_N >= 0) & (found.offset_R[within_N] == offset_N)
    is_inside_N = ~is_found_N & (within_N >= 0) & ~found.damaged_R[within_N]
    if is_inside_N.any():
        i = int(np.argmax(is_inside_N))
        raise DatasetError(
            _mismatch(rec_path, int(offset_N[i]), f"the index lists key {key_N[i]} inside another record")
        )
    found_end_R = np.append(found.offset_R[1:], size)
    reaches_N = found_end_R[within_N] == np.append(offset_N[1:], size)
    damaged_N = ~is_found_N | ~reaches_N | found.damaged_R[within_N]
    return Scan(
        offset_N,
        key_N,
        found.label_R[within_N],
        damaged_N | found.has_image_R[within_N],
        damaged_N,
        ~is_found_N | found.gap_R[within_N],
        found.end,
    )


def _mismatch(rec_path: Path, at: int, found: str) -> str:
    return (
        f"{rec_path} and {rec_path.with_suffix('.idx').name} do not match at byte {at}: {found}; "
        "they come from different datasets or one is damaged; copy both again"
    )


def _refuse_truncated(rec_path: Path, found: Scan, has_index: bool, size: int) -> None:
    """Raise DatasetError if the file is truncated."""
    if found.end > size:
        name = f" (key {found.key_R[-1]} of {rec_path.with_suffix('.idx').name})" if has_index else ""
        raise DatasetError(
            f"{rec_path}{name}: truncated: its last record, at byte {found.offset_R[-1]}, should end at byte "
            f"{found.end}, the file has {size} bytes; copy it again"
        )
    # Without an index, a damaged end cannot be distinguished from a missing one.
    if found.end < size and not has_index:
        raise DatasetError(
            f"{rec_path}: truncated: its last {size - found.end} bytes are not a record; copy it again"
        )


def _labels(rec_path: Path, found: Scan, names: set[str]) -> np.ndarray:
    """Return labels int64 of the records: from the labels file, else from the list, else as stored."""
    tsv_path = rec_path.with_suffix(".tsv")
    if rec_path.with_suffix(LABELS_SUFFIX).name in names:
        source = rec_path.with_suffix(LABELS_SUFFIX)
        # Each record takes a frame header or more.
        key_T, label_T = read_labels(rec_path, at_most=found.end // FRAME_HEADER.size)
    elif tsv_path.name in names:
        source = tsv_path
        try:
            key_T, label_T = tables.read_columns(tsv_path, 3, "'key<TAB>path<TAB>label'")
        except tables.TableError as error:
            raise DatasetError(f"{tsv_path}: {error}") from error
    else:
        return _whole_labels(rec_path, found)
    return _look_up(source, key_T, label_T, found)


def _whole_labels(rec_path: Path, found: Scan) -> np.ndarray:
    """Return the stored labels, which are float32 and so exact only for whole numbers up to 2^24."""
    label_R = found.label_R
    with np.errstate(invalid="ignore"):
        bad_R = ~((label_R >= 0) & (label_R <= FLOAT32_EXACT) & (label_R == np.floor(label_R)))
        wrong_R = bad_R & ~found.damaged_R
        if wrong_R.any():
            i = int(np.argmax(wrong_R))
            raise DatasetError(
                f"{rec_path}: key {found.key_R[i]} at byte {found.offset_R[i]} has label {label_R[i]}, "
                f"expected a whole number from 0 to {FLOAT32_EXACT} ({int(wrong_R.sum())} such records); "
                f"store larger labels in {rec_path.with_suffix(LABELS_SUFFIX).name}"
            )
        # The label of a damaged record may be wrong, so it must not add a class.
        largest = label_R[~found.damaged_R].max(initial=0)
        return np.where(bad_R | (found.damaged_R & (label_R > largest)), 0, label_R).astype(LABEL)


def _look_up(source: Path, key_T: np.ndarray, label_T: np.ndarray, found: Scan) -> np.ndarray:
    """Return the label of every record by its key. Raises DatasetError if one is missing or no class."""
    if not (key_T[1:] > key_T[:-1]).all():
        order = np.argsort(key_T, kind="stable")
        key_T, label_T = key_T[order], label_T[order]
    at_R = np.minimum(np.searchsorted(key_T, found.key_R), len(key_T) - 1) if len(key_T) else None
    is_known_R = np.zeros(len(found.key_R), bool) if at_R is None else key_T[at_R] == found.key_R
    label_R = np.where(is_known_R, 0 if at_R is None else label_T[at_R], 0).astype(LABEL)
    wrong_R = (~is_known_R & ~found.damaged_R) | (label_R < 0) | (label_R > LARGEST_LABEL)
    if wrong_R.any():
        i = int(np.argmax(wrong_R))
        what = f"label {label_R[i]}" if is_known_R[i] else "no label"
        raise DatasetError(
            f"{source}: {what} for key {found.key_R[i]}, expected a class of every image, 0 to "
            f"{LARGEST_LABEL} ({int(wrong_R.sum())} such records); copy it again from the source of the .rec "
            "file"
        )
    return label_R
