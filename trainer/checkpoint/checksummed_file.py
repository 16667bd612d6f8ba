"""Large files: written fast, summed as they pass, and soon gone from the system's cache."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 20
# How much the disk is told to begin with at a time, and how much it may have begun before some is let go.
_WINDOW, _BEGUN = 8 << 20, 256 << 20


@dataclass(frozen=True)
class FileSum:
    """The size of a file in bytes and its CRC-32 as eight hexadecimal digits."""

    size: int
    crc32: str

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Read a file. Raises OSError."""
        size = crc = 0
        piece = bytearray(_PIECE)
        with open_regular(path) as file:
            while count := file.readinto(piece):
                crc = zlib.crc32(memoryview(piece)[:count], crc)
                size += count
        return cls(size, f"{crc:08x}")


def open_regular(path: Path) -> io.FileIO:
    """Open a file to read. Raises OSError if there is none, or if it is a link, a pipe or a device."""
    # Without O_NONBLOCK the opening of a pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return io.FileIO(handle, "rb")


@contextlib.contextmanager
def naming_the_cause() -> Iterator[None]:
    """For torch.save: where a write to the file fails, its OSError comes out.

    torch would complain of the position in the file instead.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class WriteThroughFile:
    """A new file whose bytes the disk begins to take at once, and the system's cache soon forgets.

    Left alone, the system keeps all of them, instead of the images it had, and begins to write when that is
    too much, while whoever writes has to wait. Pages that are used again also cost less than new ones.
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
                # Told so, the system begins to write what it has not, and forgets what it has written.
                self._fadvise_dontneed(self._begun, _WINDOW)
                self._fadvise_dontneed(self._begun - _BEGUN, _WINDOW)
                self._begun += _WINDOW
        return len(whole)

    def _fadvise_dontneed(self, start: int, length: int) -> None:
        # Advice, which not every system takes.
        with contextlib.suppress(OSError):
            if start >= 0:
                os.posix_fadvise(self._raw.fileno(), start, length, os.POSIX_FADV_DONTNEED)

    def tell(self) -> int:
        """The number of bytes until now."""
        return self._size

    def flush(self) -> None:
        """Hand to the system what was written."""
        self._raw.flush()

    def fileno(self) -> int:
        """The descriptor, for fsync: the system has all bytes until now."""
        self._raw.flush()
        return self._raw.fileno()

    def close(self) -> None:
        """Flush and close; what is on the disk by now goes from the cache."""
        self._raw.flush()
        self._fadvise_dontneed(0, self._size)
        self._raw.close()


class SummedFile(WriteThroughFile):
    """One whose sum is known when its last byte is."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(raw)
        self._crc = 0

    @property
    def sum(self) -> FileSum:
        """Of all bytes until now."""
        return FileSum(self._size, f"{self._crc:08x}")

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, summed meanwhile by a thread if that is worth it."""
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
        # Without a sum, if the thread failed: that must not pass for one.
        [self._crc] = found
        return len(whole)
