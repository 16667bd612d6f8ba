"""Opening of files that a user names: only regular files, whose content ends and whose opening returns.

Links are followed, because datasets are often linked. A named pipe would block its reader, and a device such
as /dev/zero has no end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_data_file(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, which names the file, for anything else."""
    return os.fdopen(data_file_handle(path), "rb")


def data_file_handle(path: Path, flags: int = 0) -> int:
    """Return a descriptor of a regular file for reading. Raises OSError as `open_data_file` does.

    flags: further flags of `os.open`; with O_NOFOLLOW a link is refused.
    """
    # Without O_NONBLOCK, opening a pipe would block until there is a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    try:
        _require_regular(path, os.fstat(handle))
        # Some archive systems return EAGAIN instead of a file's content that they must fetch first.
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return handle


def data_file_stat(path: Path) -> os.stat_result:
    """Return size and times of a regular file. Raises OSError as `open_data_file` does."""
    found = os.stat(path)
    _require_regular(path, found)
    return found


def read_data_file(path: Path, at_most: int) -> bytes:
    """Return the content of a regular file. Raises OSError, also if it has more than `at_most` bytes."""
    with open_data_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= at_most else b""
    if len(content) > size:
        raise OSError(errno.EIO, f"more than its size of {size} bytes; wait until it is complete", str(path))
    if size > at_most:
        raise OSError(
            errno.EFBIG, f"{size} bytes, expected at most {at_most}; copy the file again", str(path)
        )
    return content


def lines_of(
    path: Path, most_chars: int, encoding: str = "latin-1", errors: str = "strict"
) -> Generator[str]:
    """Yield the lines of a regular text file with their ends; a longer one comes in parts of `most_chars`.

    Only a newline ends a line. Raises OSError as `open_data_file` does.
    """
    with os.fdopen(data_file_handle(path), encoding=encoding, errors=errors, newline="\n") as file:
        while line := file.readline(most_chars):
            yield line


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise OSError(errno.EINVAL, f"{kind} instead of a regular file; replace or remove it", str(path))
