"""A cache of arrays that one process writes and all map into memory: a folder of .npy files per signature.

    PLACE/.../NAME-SIGNATURE/{column}.npy, facts.json     a finished entry
    PLACE/.../NAME.HOST.xxxx.part/                        one being written; renamed when complete and on disk
    PLACE/.../NAME.lock                                   held by the process of a node that builds

An entry appears complete or not at all: a killed builder leaves only a `.part`, which the next one removes.
On a file system without locks, several processes may build the same entry; the first one to finish is used.

Another user may have written a place: an entry is used only if its files belong to a trusted user and its
content is right, and an entry is built and removed only in a place of this user.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common import bounded_json
from data_pipeline.common.terminal import echo
from data_pipeline.formats.container import COLUMNS, DatasetError

Columns = Mapping[str, Sequence[np.ndarray]]
Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]
_FACTS = "facts.json"
_LONGEST_FACTS = 1 << 20
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_SIGNATURE_DIGITS = 20
_HOLDER = re.compile(r"process [0-9]{1,10} on [\w.-]{1,253}")
_POLL_S = 0.1
# A catalog of 42 million images is built in about a minute.
_SILENT_S = 10.0


class Trust(NamedTuple):
    """Conditions for the use of an entry: the user IDs of possible owners (None: any), and a check of it."""

    owners: frozenset[int] | None
    is_right: Callable[[dict[str, np.ndarray], dict[str, Any]], bool]

    def allows(self, status: os.stat_result) -> bool:
        """Return True for a file or folder of a trusted owner that nobody else can change."""
        if self.owners is None:
            return True
        return status.st_uid in self.owners and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_or_build(
    places: Sequence[Path],
    name: str,
    signature: str,
    build: Callable[[], tuple[Columns, dict[str, Any]]],
    trust: Trust,
) -> Loaded:
    """Return the arrays and facts with this signature: from the first place that has them, else built.

    `build` returns each column in pieces, and facts that JSON can hold. They are written to the first place
    that belongs to this user and is writable, where older entries of `name` are removed. Raises DatasetError
    if there is no such place.
    """
    entry = f"{name}-{signature[:_SIGNATURE_DIGITS]}"
    for place in places:
        if (loaded := _load(place / entry, trust)) is not None:
            return loaded
    place, lock = _own_place(places, name)
    with _locked(lock, place / f"{name}.lock") as is_locked:
        if (loaded := _load(place / entry, trust)) is not None:
            return loaded
        prefix = f"{name}.{socket.gethostname()}."
        if is_locked:
            _remove(place, rf"{re.escape(prefix)}\w+\.part")
        columns, facts = build()
        try:
            loaded = _save(place, prefix, entry, columns, facts, trust)
            _remove(place, rf"(?!{entry}){re.escape(name)}-[0-9a-f]{{{_SIGNATURE_DIGITS}}}")
        except OSError as error:
            raise DatasetError(
                f"the catalog cannot be written to {place}: {error.strerror}; free some space, or set "
                "data.catalog_dir to another folder"
            ) from error
    if loaded is None:
        raise DatasetError(
            f"{place / entry}: expected the catalog that was just written, found another content; set "
            "data.catalog_dir to another folder"
        )
    return loaded


def _load(entry: Path, trust: Trust) -> Loaded | None:
    """Return the content of an entry; None if it is missing, damaged, wrong, or of an untrusted owner."""
    try:
        folder = os.open(entry, _READ | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        if not trust.allows(os.fstat(folder)):
            return None
        with _opened(folder, _FACTS, trust) as file:
            facts = bounded_json.parse(file.read(_LONGEST_FACTS))
        sizes = facts.pop("bytes")
        arrays = {column: _column(folder, column, sizes[column], trust) for column in COLUMNS}
        return (arrays, facts) if trust.is_right(arrays, facts) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    finally:
        os.close(folder)


def _opened(folder: int, name: str, trust: Trust) -> io.FileIO:
    """Open a regular file of a trusted owner, which is not a link. Raises OSError for anything else."""
    file = io.FileIO(os.open(name, _READ, dir_fd=folder), "rb")
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or not trust.allows(status):
        file.close()
        raise OSError(f"{name}: not a regular file of a trusted owner")
    return file


def _column(folder: int, name: str, size: object, trust: Trust) -> np.ndarray:
    """Return the array in a file that `_write` wrote. Raises ValueError for any other content."""
    dtype = COLUMNS[name]
    with _opened(folder, f"{name}.npy", trust) as file:
        found = os.fstat(file.fileno()).st_size
        # The header is compared, not parsed: it could claim any type and any size.
        count = max(0, found - len(_header(dtype, 0))) // dtype.itemsize
        header = _header(dtype, count)
        if size != found or found != len(header) + count * dtype.itemsize or file.read(len(header)) != header:
            raise ValueError(f"{name}.npy: no column of {count} rows")
        # A file up to the size of a page is read: an empty array cannot be mapped.
        if found <= os.sysconf("SC_PAGE_SIZE"):
            return np.frombuffer(file.read(), dtype)
        return np.memmap(file, dtype, "r", len(header), (count,)).view(np.ndarray)


def _header(dtype: np.dtype, count: int) -> bytes:
    """Return the header of an .npy file of one column."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    )
    return header.getvalue()


def _own_place(places: Sequence[Path], name: str) -> tuple[Path, int]:
    """Return the first place that belongs to this user and is writable, and its lock file, opened."""
    tried = []
    for place in places:
        try:
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
            found = place.lstat()
            if not stat.S_ISDIR(found.st_mode):
                tried.append(f"{place} (a link)")
            elif found.st_uid != os.geteuid():
                tried.append(f"{place} (of user {found.st_uid})")
            else:
                return place, _lock_file(place / f"{name}.lock")
        except OSError as error:
            tried.append(f"{place} ({error.strerror})")
    raise DatasetError(
        f"expected a writable place for the catalog, found none: {', '.join(tried)}; "
        "set data.catalog_dir to a writable folder"
    )


def _lock_file(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    # Whoever can open it, for reading only, can hold its lock.
    with suppress(OSError):
        os.fchmod(handle, 0o600)
    return handle


@contextmanager
def _locked(handle: int, path: Path) -> Iterator[bool]:
    """Wait for the lock; the system releases it when the process ends, also if it is killed."""
    try:
        is_locked = _wait_for_lock(handle, path)
        if is_locked:
            with suppress(OSError):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield is_locked
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, path: Path) -> bool:
    """Return True once the lock is held, False on a file system without locks; a long wait is shown."""
    try:
        for _ in range(round(_SILENT_S / _POLL_S)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(_POLL_S)
        holder = os.pread(handle, 512, 0).decode(errors="replace")
        known = holder if _HOLDER.fullmatch(holder) else "an unknown process"
        echo(
            f"lgaf: waiting for {known}, which has locked {path}; it builds the catalog. If it hangs, end it",
            err=True,
        )
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    except OSError:
        return False


def _save(
    place: Path, prefix: str, entry: str, columns: Columns, facts: dict[str, Any], trust: Trust
) -> Loaded | None:
    """Write an entry and return its content, as read back."""
    partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=place))
    try:
        partial.chmod(0o755)  # other users read it too
        sizes = {column: _write(partial / f"{column}.npy", pieces) for column, pieces in columns.items()}
        with open(partial / _FACTS, "w", encoding="utf-8", opener=_unshared) as file:
            json.dump({**facts, "bytes": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        # An intact entry, built on a node that shares no lock, is the same.
        if _load(place / entry, trust) is None:
            # Renamed first, because the content of another user's folder may not be removable.
            aside = f"{prefix}{secrets.token_hex(8)}.part"
            with suppress(FileNotFoundError):
                os.rename(place / entry, place / aside)
            _rename(partial, place / entry)
            _remove(place, re.escape(aside))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # Some file systems report another owner or other modes than those that were set.
    return _load(place / entry, trust._replace(owners=None))


def _rename(partial: Path, final: Path) -> None:
    try:
        os.rename(partial, final)
    except OSError as error:
        # Another process has just finished the same entry.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _write(path: Path, pieces: Sequence[np.ndarray]) -> int:
    """Write one column, piece by piece; return the size of the file."""
    with open(path, "wb", opener=_unshared) as file:
        file.write(_header(pieces[0].dtype, sum(map(len, pieces))))
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, pieces[0].dtype).data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _unshared(path: str, flags: int) -> int:
    """Open a new file that only this user can change, whatever the umask, as `Trust.allows` requires."""
    return os.open(path, flags, 0o644)


def _remove(place: Path, pattern: str) -> None:
    """Remove folders and links of this user whose whole name matches; links are not followed."""
    for path in place.iterdir():
        with suppress(OSError):
            if not re.fullmatch(pattern, path.name) or path.lstat().st_uid != os.geteuid():
                continue
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
