"""Atomic writes: files and folders that appear complete or not at all, and files flushed to the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Create a hidden folder beside `out`, and rename it to `out` if the block ends without an exception.

    Remains of a killed process are removed first.

    Raises ValueError if `out` has content or is being written, and OSError, which names `out`, if the disk is
    full.
    """
    require_empty(out)
    out = out.resolve()
    if out.is_mount():
        raise ValueError(f"{out}: expected a new folder, found the root of a disk; name a folder in it")
    partial = out.with_name(f".{out.name}.part")
    with locked(partial):
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            with naming_full_disks(out):
                yield partial
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """Return a hidden path beside `out` with the same suffix, to write a file to.

    If the block ends without an exception, the file is flushed to the disk and renamed to `out`, and replaces
    an earlier file of this name; else it is removed.

    Raises ValueError if `out` has no parent folder, and OSError, which names `out`, if the disk is full.
    """
    if not out.parent.is_dir() or out.is_dir():
        found = "a folder" if out.is_dir() else f"no folder {out.parent}"
        raise ValueError(
            f"{out}: expected a file to write in an existing folder, found {found}; choose another path"
        )
    partial = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        with naming_full_disks(out):
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def require_empty(out: Path) -> None:
    """Raise ValueError if `out` exists and is not an empty folder."""
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names or not out.is_dir():
        found = f"{len(names)} entries ({', '.join(names[:5])})" if names else "a file"
        raise ValueError(f"{out}: expected an empty folder to write into, found {found}; choose another name")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, created if missing, for this process. Raises ValueError if another one has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing it; wait until it ends") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming_full_disks(out: Path) -> Iterator[None]:
    """Add the path, the free space and the state of the output to an OSError for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free_gb = shutil.disk_usage(out.parent).free / 1e9
        raise OSError(
            f"{out}: expected space to write, found none ({error.strerror}; {free_gb:.1f} GB are free "
            "now); no incomplete file has a final name; free some space, or write to another disk"
        ) from error


def write_through(path: Path, text: str) -> None:
    """Write a file and flush its content, but not its directory entry, to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
