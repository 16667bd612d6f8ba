"""The interface between the catalog and a container (RecordIO folder, folder of images, tar shards...).

A container is a module with three functions:

    list_files(folder) -> FileTable | None     the files of the dataset; None for another kind of folder
    read_records(files, progress) -> Records   position and label of every image, in one pass
    image_of(span, where, offset) -> uint8     the encoded image in a record's bytes; RecordError if damaged

`progress(done, total)` counts bytes. A DatasetError concerns the dataset, a RecordError
one record.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_pipeline.common.data_file import data_file_stat

# The number of classes, which is larger by one, must be an int64 too.
LARGEST_LABEL = (1 << 63) - 2

Progress = Callable[[int, int], None]


class RecordError(ValueError):
    """A record or an index does not follow its format; the message names the file and the byte offset."""


class DatasetError(ValueError):
    """A dataset cannot be used for training; the message names the file, the expectation and a remedy."""


class Records(NamedTuple):
    """The N images of a dataset, in the order of their files and of their offsets.

    `file_N` int32 is the number of the file in the dataset's FileTable, `offset_N` int64 and `length_N` int32
    are the record's bytes in it, `label_N` int64 is the class, `key_N` int64 is the container's key of the
    record. `damaged_K` int64 are the numbers of the records that cannot be read, ascending.
    """

    file_N: np.ndarray
    offset_N: np.ndarray
    length_N: np.ndarray
    label_N: np.ndarray
    key_N: np.ndarray
    damaged_K: np.ndarray


FILE, OFFSET, LENGTH, LABEL, KEY = map(np.dtype, ("<i4", "<i8", "<i4", "<i8", "<i8"))
COLUMNS = dict(zip(Records._fields, (FILE, OFFSET, LENGTH, LABEL, KEY, OFFSET), strict=True))
LONGEST = np.iinfo(LENGTH).max  # stands for every longer length


def joined(parts: Sequence[Records]) -> Records:
    """Concatenate the records of several files; `damaged_K` of each part counts from its first record."""
    if len(parts) == 1:
        return parts[0]
    starts = accumulate((len(part.label_N) for part in parts), initial=0)
    shifted = [
        part._replace(damaged_K=part.damaged_K + start) for part, start in zip(parts, starts, strict=False)
    ]
    return Records(*map(np.concatenate, zip(*shifted, strict=True)))


@dataclass(frozen=True)
class FileTable:
    """Files of one folder with their sizes and times, by which a change is detected; no object per file.

    `names` are paths relative to the folder, a zero byte after each; `size_F` and `mtime_F` (ns) are int64.
    """

    folder: Path
    names: bytes
    size_F: np.ndarray
    mtime_F: np.ndarray

    def __len__(self) -> int:
        return len(self.size_F)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)

    def name(self, file: int) -> str:
        """Return the path of a file relative to the folder."""
        start = int(self._ends[file - 1]) + 1 if file else 0
        return os.fsdecode(self.names[start : int(self._ends[file])])

    def path(self, file: int) -> Path:
        """Return the path of a file."""
        return self.folder / self.name(file)

    def signature(self) -> bytes:
        """Return a digest of names, sizes and times, which does not depend on the folder's path."""
        digest = hashlib.sha256(self.names)
        digest.update(self.size_F.tobytes())
        digest.update(self.mtime_F.tobytes())
        return digest.digest()


def file_names(folder: Path) -> list[str]:
    """Return the sorted names in `folder` that are not folders; an empty list if it is not a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.is_dir()) if folder.is_dir() else []


def table_of(folder: Path, names: Iterable[str]) -> FileTable:
    """Return the FileTable of some files in `folder`. Raises DatasetError if one is not a regular file."""
    blob, numbers = bytearray(), []
    for name in names:
        found = stat_of(folder / name)
        blob += os.fsencode(name) + b"\0"
        numbers.append((found.st_size, found.st_mtime_ns))
    size_F, mtime_F = np.array(numbers, np.int64).reshape(-1, 2).T.copy()
    return FileTable(folder, bytes(blob), size_F, mtime_F)


def stat_of(path: Path) -> os.stat_result:
    """Return size and times of a file. Raises DatasetError if it is missing or not a regular file."""
    try:
        return data_file_stat(path)
    except OSError as error:
        raise DatasetError(f"{path}: expected a file of the dataset, found: {error.strerror}") from error


class Container(Protocol):
    """The module of a container; the module docstring describes its functions."""

    def list_files(self, folder: Path) -> FileTable | None: ...

    def read_records(self, files: FileTable, progress: Progress) -> Records: ...

    def image_of(self, span: bytes, where: str, offset: int) -> np.ndarray: ...
