"""Reads of byte ranges from files that must not change while they are in use.

A file is read by position, not through a memory map: if it has been truncated, a map kills the process
(SIGBUS), and a read returns fewer bytes. Both are equally fast (8 KB ranges in one thread, warm cache: 0.4
million per second).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from data_pipeline.common.data_file import data_file_handle
from data_pipeline.formats.container import DatasetError, FileTable

# A process may usually have 1024 files open. Files beyond this number are opened for each range.
_MOST_OPEN = 512


class _Opened(NamedTuple):
    descriptor: int
    size: int
    mtime_ns: int


class ByteRanges:
    """Reads ranges of the files of several tables; the files are numbered across the tables."""

    def __init__(self, tables: Sequence[FileTable]) -> None:
        self._tables = tables
        self._first = np.array([0, *accumulate(map(len, tables))])
        self._kept: dict[int, _Opened] = {}
        weakref.finalize(self, _close_all, self._kept)

    def name(self, file: int) -> str:
        """Return the path of a file."""
        table, within = self._place(file)
        return str(self._tables[table].path(within))

    def read(self, file: int, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on.

        Raises DatasetError if the file cannot be read, or has changed since its table was made.
        """
        opened = self._kept.get(file)
        if opened is not None:
            return self._range(file, opened, offset, length)
        opened = self._open(file)
        if len(self._kept) < _MOST_OPEN:
            self._kept[file] = opened
            return self._range(file, opened, offset, length)
        try:
            return self._range(file, opened, offset, length)
        finally:
            os.close(opened.descriptor)

    def _place(self, file: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._first, file, side="right")) - 1
        return table, file - int(self._first[table])

    def _open(self, file: int) -> _Opened:
        table, within = self._place(file)
        files = self._tables[table]
        try:
            descriptor = data_file_handle(files.path(within))
        except OSError as error:
            raise self._unreadable(file, error) from error
        return _Opened(descriptor, int(files.size_F[within]), int(files.mtime_F[within]))

    def _range(self, file: int, opened: _Opened, offset: int, length: int) -> bytes:
        descriptor, size, mtime_ns = opened
        try:
            found = os.fstat(descriptor)
            data = os.pread(descriptor, length, offset)
        except OSError as error:
            raise self._unreadable(file, error) from error
        if len(data) == length and found.st_mtime_ns == mtime_ns and found.st_size == size and found.st_nlink:
            return data
        if not found.st_nlink:
            change = "has been deleted or replaced since"
        elif found.st_size < size or len(data) < length:
            change = "is shorter than when"
        else:
            change = "has been written to since"
        raise DatasetError(
            f"{self.name(file)} {change} its catalog was made ({size} bytes then, {found.st_size} now); "
            "do not change a dataset while it is in use; restart the run"
        )

    def _unreadable(self, file: int, error: OSError) -> DatasetError:
        return DatasetError(
            f"{self.name(file)} existed when its catalog was made and cannot be read now: "
            f"{error.strerror}; do not change a dataset while it is in use; restart the run"
        )


def _close_all(kept: dict[int, _Opened]) -> None:
    for opened in kept.values():
        os.close(opened.descriptor)
