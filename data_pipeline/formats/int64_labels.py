"""Integer labels in a file beside a `.rec`, for labels that float32, RecordIO's label type, cannot hold.

`train.labels.npy` belongs to `train.rec`: an int64 array [N, 2] of keys and labels, as numpy.save writes it.
The header is matched literally, because numpy's reader parses it as Python and raises arbitrary exceptions.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

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
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            np.save(file, np.stack([key_N, label_N], axis=1).astype("<i8"), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_labels(rec_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and labels int64 [N] of the file beside `rec_path`.

    Raises DatasetError if the file has another format.
    """
    path = rec_path.with_suffix(LABELS_SUFFIX)
    with open(path, "rb") as file:
        head = file.read(256)
    found, size_bytes = _HEADER.match(head), path.stat().st_size
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
    table_N2 = np.fromfile(path, "<i8", offset=start).reshape(count, 2)
    return table_N2[:, 0].copy(), table_N2[:, 1].copy()
