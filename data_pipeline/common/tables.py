"""Reads integers from tab-separated tables of tens of millions of lines."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from data_pipeline.common.data_file import lines_of

# A line that is too long for a table comes in parts, which are no lines of a table.
_MAX_LINE_CHARS = 4096


class TableError(ValueError):
    """A line does not have the expected fields; the message gives its number and its content."""


def read_columns(path: Path, columns: int, expected: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last of the `columns` (2 or more) fields of each line, as int64 [lines].

    Raises TableError if the table is empty, or for the first line without the `expected` fields.
    """
    dtype = [("first", "i8"), *((f"between_{i}", "S1") for i in range(columns - 2)), ("last", "i8")]
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty table
            table_L = np.loadtxt(
                lines_of(path, _MAX_LINE_CHARS), dtype, delimiter="\t", comments=None, ndmin=1
            )
    except ValueError:
        raise TableError(_first_bad_line(path, columns, expected)) from None
    if not len(table_L):
        raise TableError("no records are listed")
    if min(table_L["first"].min(), table_L["last"].min()) < 0:
        raise TableError(_first_bad_line(path, columns, expected))
    return np.ascontiguousarray(table_L["first"]), np.ascontiguousarray(table_L["last"])


def _first_bad_line(path: Path, columns: int, expected: str) -> str:
    good = re.compile(r"\s*|" + r" *\d{1,18} *\t" + r"[^\t]*\t" * (columns - 2) + r" *\d{1,19}\s*")
    for number, line in enumerate(lines_of(path, _MAX_LINE_CHARS), 1):
        if not good.fullmatch(line):
            return f"line {number} is {line.rstrip()[:60]!r}, expected {expected}"
    return f"a number is out of range, expected {expected}"
