"""The container for a folder of images: one sub-folder per identity, in natural order (s2 before s10).

Every start reads the size and the time of every image file, which is slow for millions of files;
`lgaf data pack` writes them into one file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from data_pipeline.formats.container import (
    FILE,
    KEY,
    LABEL,
    LENGTH,
    LONGEST,
    OFFSET,
    DatasetError,
    FileTable,
    Progress,
    RecordError,
    Records,
    stat_of,
)

_OTHER_SUFFIXES = {".rec", ".idx", ".tar", ".bin", ".lst", ".tsv", ".csv", ".txt", ".json", ".npy", ".zip"}


def listed(folder: Path) -> list[Path]:
    """Return the entries of a folder in natural order, without those whose name starts with a dot."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural)


def natural(path: Path) -> tuple[list[str | int], str]:
    """Return a sort key that orders numbers inside names by value."""
    # Text and numbers alternate in `parts`, so that a number is only compared with a number.
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], path.name


def list_files(folder: Path) -> FileTable | None:
    """Return the images of all identity folders; None if there is no sub-folder.

    Raises DatasetError for an identity without images, and for a file whose suffix is not that of an image.
    """
    identities = [path for path in listed(folder) if path.is_dir()] if folder.is_dir() else []
    if not identities:
        return None
    names, stats = bytearray(), [np.empty((0, 2), np.int64)]
    for identity in identities:
        files = listed(identity)
        if not files:
            raise DatasetError(f"{identity}: expected the images of one identity, found none; remove it")
        stats.append(np.array([_stat(path) for path in files], np.int64))
        names += b"".join(os.fsencode(f"{identity.name}/{path.name}") + b"\0" for path in files)
    size_F, mtime_F = np.concatenate(stats).T.copy()
    return FileTable(folder, bytes(names), size_F, mtime_F)


def read_records(files: FileTable, progress: Progress) -> Records:
    """Return one record per file, with all of its bytes; an empty file is a damaged record."""
    label_N = np.empty(len(files), LABEL)
    label, latest = -1, b""
    start = 0
    for i in range(len(files)):
        end = files.names.index(b"\0", start)
        identity = files.names[start : files.names.index(b"/", start, end)]
        label, latest, start = label + (identity != latest), identity, end + 1
        label_N[i] = label
    return Records(
        np.arange(len(files), dtype=FILE),
        np.zeros(len(files), OFFSET),
        np.minimum(files.size_F, LONGEST).astype(LENGTH),
        label_N,
        np.arange(len(files), dtype=KEY),
        np.flatnonzero(files.size_F == 0),
    )


def image_of(span: bytes, where: str, offset: int) -> np.ndarray:
    """Return the file's bytes, uint8. Raises RecordError if the file is empty."""
    if not span:
        raise RecordError(f"{where}: expected an image, found an empty file")
    return np.frombuffer(span, np.uint8)


def _stat(path: Path) -> tuple[int, int]:
    if path.suffix.lower() in _OTHER_SUFFIXES or path.is_dir():
        raise DatasetError(
            f"{path}: expected an image in the sub-folder of an identity, found a {path.suffix or 'folder'}; "
            "remove it, or set data.path to the folder of one dataset"
        )
    found = stat_of(path)
    return found.st_size, found.st_mtime_ns
