"""A cache of arrays that one process writes and all map into memory: a folder of .npy files per signature.

    PLACE/.../NAME-SIGNATURE/{column}.npy, facts.json     a finished entry
    PLACE/.../NAME.HOST.xxxx.part/                        one being written; renamed when complete and on disk
    PLACE/.../NAME.lock                                   held by the process of a node that builds

An entry appears complete or not at all: a killed builder leaves only a `.part`, which the next one removes.
On a file system without locks, several processes may build the same entry; the first one to finish is used.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.atomic_write import write_through
from data_pipeline.formats.container import DatasetError

Columns = Mapping[str, Sequence[np.ndarray]]
Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]
_FACTS = "facts.json"


def open_or_build(
    places: Sequence[Path], name: str, signature: str, build: Callable[[], tuple[Columns, dict[str, Any]]]
) -> Loaded:
    """Return the arrays and facts with this signature: from the first place that has them, else built.

    `build` returns each column in pieces, and facts that JSON can hold. They are written to the first
    writable place, where older entries of `name` are removed. Raises DatasetError if no place is writable.
    """
    entry = f"{name}-{signature[:20]}"
    for place in places:
        if (loaded := _load(place / entry)) is not None:
            return loaded
    place = _first_writable(places, name)
    with _locked(place / f"{name}.lock") as is_locked:
        if (loaded := _load(place / entry)) is not None:
            return loaded
        host = socket.gethostname()
        if is_locked:
            _remove(place.glob(f"{name}.{host}.*.part"))
        columns, facts = build()
        try:
            _save(place, f"{name}.{host}.", entry, columns, facts)
            _remove(path for path in place.glob(f"{name}-*") if path.name != entry)
        except OSError as error:
            raise DatasetError(
                f"the catalog cannot be written to {place}: {error.strerror}; free some space, or set "
                "data.catalog_dir to another folder"
            ) from error
    loaded = _load(place / entry)
    assert loaded is not None
    return loaded


def _load(entry: Path) -> Loaded | None:
    """Return the content of an entry; None if it is missing, or one of its files is damaged."""
    try:
        facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        arrays = {}
        for column, size in facts.pop("bytes").items():
            path = entry / f"{column}.npy"
            if path.stat().st_size != size:
                return None
            array = np.load(path, mmap_mode="r" if size > _smallest_map() else None, allow_pickle=False)
            arrays[column] = array.view(np.ndarray)
    except (OSError, ValueError, KeyError, AttributeError, EOFError):
        return None
    return arrays, facts


def _smallest_map() -> int:
    """Return the file size up to which an array is read: an empty array cannot be mapped."""
    return os.sysconf("SC_PAGE_SIZE")


def _first_writable(places: Sequence[Path], name: str) -> Path:
    tried = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with open(place / f"{name}.lock", "ab"):
                return place
        except OSError as error:
            tried.append(f"{place} ({error.strerror})")
    raise DatasetError(
        f"expected a writable place for the catalog, found none: {', '.join(tried)}; "
        "set data.catalog_dir to a writable folder"
    )


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for the lock; the system releases it when the process ends, also if it is killed."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except OSError:  # a file system without locks
            is_locked = False
        yield is_locked


def _save(place: Path, prefix: str, entry: str, columns: Columns, facts: dict[str, Any]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=place))
    try:
        partial.chmod(0o755)  # other users read it too
        sizes = {column: _write(partial / f"{column}.npy", pieces) for column, pieces in columns.items()}
        write_through(partial / _FACTS, json.dumps({**facts, "bytes": sizes}))
        if _load(place / entry) is None:
            # A damaged entry may exist. An intact entry, built on a node that shares no lock, is the same.
            shutil.rmtree(place / entry, ignore_errors=True)
            _rename(partial, place / entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, final: Path) -> None:
    try:
        os.rename(partial, final)
    except OSError:
        if _load(final) is None:
            raise


def _write(path: Path, pieces: Sequence[np.ndarray]) -> int:
    """Write one column, piece by piece; return the size of the file."""
    with open(path, "wb") as file:
        shape = (sum(map(len, pieces)),)
        header = {"descr": pieces[0].dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, pieces[0].dtype).data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _remove(folders: Iterator[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
