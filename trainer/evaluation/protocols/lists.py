"""Readers of the lists in the official layouts; their errors name the file and the line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from data_pipeline.common.data_file import lines_of
from trainer.evaluation.protocol import ProtocolFileError

_MOST_LINE_CHARS = 1 << 16
Columns = list[tuple[str, str] | tuple[str, str, tuple[int, ...]]]


def read_table(path: Path, columns: Columns, *, delimiter: str | None = None, header: int = 0) -> np.ndarray:
    """Read the first columns of a text file to a structured array, one record per line that is not blank.

    columns: the fields of the array; text is bytes (S). header: the number of lines to skip. Raises
    ProtocolFileError if the file cannot be read, is empty or has an invalid line.
    """
    dtype = np.dtype(columns)
    size = sum(int(np.prod(dtype[name].shape)) for name in dtype.names or ())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for an empty file, which is reported below
            table = np.loadtxt(
                lines_of(path, _MOST_LINE_CHARS),
                dtype,
                delimiter=delimiter,
                skiprows=header,
                usecols=range(size),
                ndmin=1,
                comments=None,
            )
    except OSError as error:
        raise missing(path, error) from error
    except (ValueError, OverflowError) as error:
        raise _bad_line(path, dtype, delimiter, header, error) from error
    if not len(table):
        raise ProtocolFileError(
            f"{path}: expected lines of {_fields(dtype)}, found none; copy the file again"
        )
    for name in dtype.names or ():
        if table[name].dtype.kind == "f" and not np.isfinite(table[name]).all():
            line = header + 1 + int(np.argwhere(~np.isfinite(table[name]))[0][0])
            raise ProtocolFileError(
                f"{path}: expected finite numbers as {name}, found others, the first about line {line}; "
                "copy the file again"
            )
    return table


def encoded(names: list[str]) -> np.ndarray:
    """Return file names as bytes [N], which need a third of the memory of a list of texts."""
    return np.array([os.fsencode(name) for name in names], "S")


def listing(folder: Path) -> list[str]:
    """Return the sorted names in a folder. Raises ProtocolFileError if it is unreadable or empty."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise missing(folder, error) from error
    if not names:
        raise ProtocolFileError(f"{folder}: expected images, found none; unpack the data set here")
    return names


def missing(path: Path, error: OSError) -> ProtocolFileError:
    return ProtocolFileError(
        f"{path}: expected the official layout, found: {error.strerror or error}; see docs/evaluation.md"
    )


def _bad_line(path: Path, dtype: np.dtype, delimiter: str | None, header: int, why: Exception) -> Exception:
    """Return the error of the first invalid line; NumPy's own line numbers in `why` skip some lines."""
    shapes = [(dtype[name].base.type, int(np.prod(dtype[name].shape))) for name in dtype.names or ()]
    kinds = [kind for kind, count in shapes for _ in range(count)]
    for number, line in enumerate(lines_of(path, _MOST_LINE_CHARS), 1):
        if number > header and line.strip() and not _fits(line.split(delimiter), kinds):
            return ProtocolFileError(
                f"{path}, line {number}: expected {_fields(dtype)}, found {line.strip()[:80]!r}; "
                "copy the file again"
            )
    return ProtocolFileError(f"{path}: expected lines of {_fields(dtype)}, found: {why}; copy the file again")


def _fits(fields: list[str], kinds: list[type]) -> bool:
    try:
        for field, kind in zip(fields, kinds, strict=False):
            if issubclass(kind, np.number):
                kind(field)
    except (ValueError, OverflowError):
        return False
    return len(fields) >= len(kinds)


def _fields(dtype: np.dtype) -> str:
    return ", ".join(
        f"{name} ({int(np.prod(dtype[name].shape))} numbers)" if dtype[name].shape else name
        for name in dtype.names or ()
    )
