"""Labels beside a `.rec` as whole numbers, where float32, RecordIO's type of label, cannot hold them.

`train.labels.npy` belongs to `train.rec`: an int64 array [N, 2] of keys and labels, as numpy.save writes it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data_pipeline.container import DatasetError

LABELS_SUFFIX = ".labels.npy"


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
    """Keys and labels int64 [N] of the file beside `rec_path`. Raises DatasetError if it is not one."""
    path = rec_path.with_suffix(LABELS_SUFFIX)
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: expected int64 [N, 2], keys and labels; found: {error}") from error
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.int64:
        raise DatasetError(
            f"{path}: expected int64 [N, 2], keys and labels; found {table.dtype} {list(table.shape)}"
        )
    return np.array(table[:, 0]), np.array(table[:, 1])
