"""Large files that are checksummed while they are written, and dropped from the page cache soon after."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.common.data_file import data_file_handle

_PIECE = 1 << 20
# Bytes per request to start writeback, and bytes under writeback before the oldest leave the cache.
_WINDOW, _BEGUN = 8 << 20, 256 << 20


@dataclass(frozen=True)
class FileSum:
    """The size of a file in bytes and its CRC-32 as eight hexadecimal digits."""

    size: int
    crc32: str

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Read a file and return its size and checksum. Raises OSError."""
        size = crc = 0
        piece = bytearray(_PIECE)
        with open_regular(path) as file:
            while count := file.readinto(piece):
                crc = zlib.crc32(memoryview(piece)[:count], crc)
                size += count
        return cls(size, f"{crc:08x}")


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading. Raises OSError if it is missing, a link, a pipe or a device."""
    return io.FileIO(data_file_handle(path, os.O_NOFOLLOW), "rb")


@contextlib.contextmanager
def naming_the_cause() -> Iterator[None]:
    """Raise the OSError of a failed write inside torch.save.

    torch.save itself raises a RuntimeError about the position in the file instead.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class WriteThroughFile:
    """A new file whose writeback starts at once and whose pages leave the page cache soon.

    By default the system would keep all pages, evict cached images for them, and start writeback only at a
    limit, where it blocks the writer. Reused pages are also cheaper than new ones.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._size, self._begun = raw, 0, 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _PIECE):
            piece = whole[start : start + _PIECE]
            self._raw.write(piece)
            self._size += len(piece)
            while self._size - self._begun >= _WINDOW:
                # On this advice the system starts to write dirty pages, and drops the clean ones.
                self._fadvise_dontneed(self._begun, _WINDOW)
                self._fadvise_dontneed(self._begun - _BEGUN, _WINDOW)
                self._begun += _WINDOW
        return len(whole)

    def _fadvise_dontneed(self, start: int, length: int) -> None:
        # Not every file system supports this advice, and none needs it.
        with contextlib.suppress(OSError):
            if start >= 0:
                os.posix_fadvise(self._raw.fileno(), start, length, os.POSIX_FADV_DONTNEED)

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Pass all bytes written so far to the system."""
        self._raw.flush()

    def fileno(self) -> int:
        """Flush, and return the descriptor, for fsync."""
        self._raw.flush()
        return self._raw.fileno()

    def close(self) -> None:
        """Flush, drop the pages that are on the disk from the cache, and close."""
        self._raw.flush()
        self._fadvise_dontneed(0, self._size)
        self._raw.close()


class SummedFile(WriteThroughFile):
    """A write-through file that computes its checksum while it is written."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(raw)
        self._crc = 0

    @property
    def sum(self) -> FileSum:
        """The size and checksum of all bytes so far."""
        return FileSum(self._size, f"{self._crc:08x}")

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; a thread computes the checksum of large pieces at the same time."""
        whole = memoryview(data).cast("B")
        if len(whole) < _PIECE:
            self._crc = zlib.crc32(whole, self._crc)
            return super().write(whole)
        found: list[int] = []
        summing = threading.Thread(target=lambda: found.append(zlib.crc32(whole, self._crc)))
        summing.start()
        try:
            super().write(whole)
        finally:
            summing.join()
        # Unpacking fails if the thread failed and left no checksum.
        [self._crc] = found
        return len(whole)
