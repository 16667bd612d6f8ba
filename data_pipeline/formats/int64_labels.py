"""Integer labels in a file beside a `.rec`, for labels that float32, RecordIO's label type, cannot hold.

`train.labels.npy` belongs to `train.rec`: an int64 array [N, 2] of keys and labels, as numpy.save writes it.
The header is matched literally, because numpy's reader parses it as Python and raises arbitrary exceptions.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.common.atomic_write import private_file
from data_pipeline.common.data_file import open_data_file
from data_pipeline.formats.container import DatasetError

LABELS_SUFFIX = ".labels.npy"
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<i8', 'fortran_order': False, 'shape': \(([0-9]{1,15}), 2\), \} *\n",
    re.DOTALL,
)


def write_labels(rec_path: Path, key_N: np.ndarray, label_N: np.ndarray) -> None:
    """Write the integer labels of the records `key_N`, beside `rec_path`; they replace those in the records.

    The file is an int64 array [N, 2] of keys and labels; it appears only when complete.
    """
    path = rec_path.with_suffix(LABELS_SUFFIX)
    with private_file(path) as partial, open(partial, "wb") as file:
        np.save(file, np.stack([key_N, label_N], axis=1).astype("<i8"), allow_pickle=False)


def read_labels(rec_path: Path, at_most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and labels int64 [N] of the file beside `rec_path`.

    Raises DatasetError if the file has another format, or more than `at_most` labels.
    """
    path = rec_path.with_suffix(LABELS_SUFFIX)
    with open_data_file(path) as file:
        return _read_table(path, file, at_most)


def _read_table(path: Path, file: BinaryIO, at_most: int | None) -> tuple[np.ndarray, np.ndarray]:
    head, size_bytes = file.read(256), os.fstat(file.fileno()).st_size
    found = _HEADER.match(head)
    if found is None:
        raise DatasetError(
            f"{path}: expected int64 [N, 2], keys and labels; found a file that begins with {head[:80]!r}; "
            "write it again with numpy.save"
        )
    count, start = int(found[1]), found.end()
    if size_bytes != start + 16 * count:
        raise DatasetError(
            f"{path}: expected {count} keys and labels from byte {start}, {start + 16 * count} bytes in all, "
            f"found {size_bytes} bytes; copy it again"
        )
    if at_most is not None and count > at_most:
        raise DatasetError(
            f"{path}: expected the labels of at most {at_most} records, found {count}; copy it again"
        )
    file.seek(start)
    table_N2 = np.fromfile(file, "<i8", 2 * count).reshape(count, 2)
    return table_N2[:, 0].copy(), table_N2[:, 1].copy()
