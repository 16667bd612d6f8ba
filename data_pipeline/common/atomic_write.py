"""Atomic writes: files and folders that appear complete or not at all, and files flushed to the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_TOKEN_BYTES = 8


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Create a hidden folder beside `out`, and rename it to `out` if the block ends without an exception.

    Folders that killed processes left are removed first.

    Raises ValueError if `out` has content or is being written, and OSError, which names `out`, if the disk is
    full.
    """
    require_empty(out)
    if out.is_symlink() and out.lstat().st_uid not in (0, os.geteuid()):
        raise ValueError(f"{out}: expected your own folder, found another user's link; choose another name")
    out = out.resolve()
    if out.is_mount():
        raise ValueError(f"{out}: expected a new folder, found the root of a disk; name a folder in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = _remove_remains(out)
    if writer is not None:
        raise ValueError(f"{out}: another process is writing it ({writer.name}); wait until it ends")
    with _locked_new(out, _new_folder) as partial:
        try:
            with naming_full_disks(out):
                yield partial
            require_empty(out)  # another process may have written it on a file system without locks
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """Create a hidden file beside `out` with the same suffix, for the block to write to.

    If the block ends without an exception, the file is flushed to the disk and renamed to `out`, and replaces
    an earlier file or link of this name; else it is removed. Of several processes that write `out` at the
    same time, the last one to finish replaces the files of the others.

    Raises ValueError if `out` has no parent folder, and OSError, which names `out`, if the disk is full.
    """
    if not out.parent.is_dir() or (out.exists() and not out.is_file()):
        there = "a folder" if out.is_dir() else "a pipe or device"
        found = there if out.exists() else f"no folder {out.parent}"
        raise ValueError(
            f"{out}: expected a file to write in an existing folder, found {found}; choose another path"
        )
    # Some writers select the format by the suffix.
    with naming_full_disks(out), private_file(out, ending=out.suffix) as partial:
        yield partial


@contextlib.contextmanager
def private_file(out: Path, *, ending: str = "") -> Iterator[Path]:
    """Do the same as `staged_file`, without its checks and its messages: for files of a larger output.

    The name of the hidden file has the suffix .part, or `.part` and `ending`.
    """
    _remove_remains(out, ending)
    with _locked_new(out, _new_file, ending) as partial:
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)


def close_if_possible(file: IO[Any]) -> None:
    """Close a file; after an error for a full disk this writes the buffer once more and fails again."""
    with contextlib.suppress(OSError):
        file.close()


def open_to_append(path: Path) -> int:
    """Open a log for appending, created if missing, and return its descriptor.

    Raises OSError, which names the file, for a link, a pipe or a device: it could lead to another file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o644)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    raise OSError(f"{path}: expected a regular file to append to, found a link, pipe or device; remove it")


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, _FOLDER)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


@contextlib.contextmanager
def _locked_new(out: Path, create: Callable[[Path], int], ending: str = "") -> Iterator[Path]:
    """Create a file or folder with a random name beside `out`, and lock it while the block uses it.

    A planted file or link of this name would have to be guessed, and makes the creation fail.
    """
    while True:
        path = out.with_name(f".{out.name}.{secrets.token_hex(_TOKEN_BYTES)}.part{ending}")
        handle = create(path)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Between the creation and the lock, another process can have taken it for remains.
            if not _is_at(path, handle):
                continue
            yield path
            return
        finally:
            os.close(handle)


def _remove_remains(out: Path, ending: str = "") -> Path | None:
    """Remove the remains of this user's killed writers of `out`; return the path of a running one, if any."""
    token = f"[0-9a-f]{{{2 * _TOKEN_BYTES}}}"
    name = re.compile(rf"\.{re.escape(out.name)}\.{token}\.part{re.escape(ending)}")
    with contextlib.suppress(OSError), os.scandir(out.parent) as entries:
        found = [Path(entry) for entry in entries if name.fullmatch(entry.name)]
        running = [path for path in found if not _remove_if_left(path)]
        return next(iter(running), None)
    return None


def _remove_if_left(path: Path) -> bool:
    """Remove a file or folder of this user that no process has locked; return False if one has."""
    with contextlib.suppress(OSError):  # no right, a file system without locks, or removed by another process
        is_folder = path.is_dir() and not path.is_symlink()
        # NFS locks only files that are open for writing.
        handle = os.open(path, _FOLDER if is_folder else os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if os.fstat(handle).st_uid != os.geteuid():
                return True
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, handle):
                shutil.rmtree(path) if is_folder else path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Return True if a path, without following a link, leads to an open file or folder."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


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
        except OSError:
            pass  # a file system without locks
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
