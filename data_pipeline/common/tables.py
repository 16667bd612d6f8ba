"""Whole numbers from tables with tabs, tens of millions of lines at a time: arrays in, arrays out.

The text is read in pieces that end with a line. In each, the positions of tabs and line ends say where the
fields lie, and the numbers of all lines grow together, a digit at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_PIECE_BYTES = 1 << 22
_MOST_DIGITS = 18  # always fit an int64
_TAB, _LINE_END, _RETURN, _ZERO = b"\t\n\r0"


class TableError(ValueError):
    """A line that is not as expected; says which and what it is."""


def read_columns(path: Path, columns: int, expected: str) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last of the `columns` (2 or more) of each line, whole numbers, as int64 [lines].

    Raises TableError naming the first line that is not as `expected` says, or saying that there is none.
    """
    firsts, lasts, lines = [], [], 0
    for text in _pieces(path):
        parsed = _parse(np.frombuffer(text, np.uint8), columns)
        if parsed is None:
            raise TableError(_first_bad_line(text, lines, columns, expected))
        firsts.append(parsed[0])
        lasts.append(parsed[1])
        lines += len(parsed[0])
    if not lines:
        raise TableError("no records are listed")
    return np.concatenate(firsts), np.concatenate(lasts)


def _pieces(path: Path) -> Iterator[bytes]:
    """The text in pieces of whole lines; each ends with a line end."""
    with open(path, "rb") as file:
        rest = b""
        while piece := file.read(_PIECE_BYTES):
            whole, line_end, rest = (rest + piece).rpartition(b"\n")
            if line_end:
                yield whole + line_end
        if rest.strip():
            yield rest + b"\n"


def _parse(text: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The first and last numbers of all lines; None if a line has other fields."""
    end_L = np.flatnonzero(text == _LINE_END)
    begin_L = np.concatenate([[0], end_L[:-1] + 1])
    tabs = np.flatnonzero(text == _TAB)
    if len(tabs) != len(end_L) * (columns - 1):
        return None
    tab_LT = tabs.reshape(len(end_L), columns - 1)
    if (tab_LT[:, 0] < begin_L).any() or (tab_LT[:, -1] > end_L).any():
        return None
    end_L -= text[end_L - 1] == _RETURN
    first, last = _numbers(text, begin_L, tab_LT[:, 0]), _numbers(text, tab_LT[:, -1] + 1, end_L)
    return None if first is None or last is None else (first, last)


def _numbers(text: np.ndarray, begin_L: np.ndarray, end_L: np.ndarray) -> np.ndarray | None:
    """The numbers at [begin, end); None if one is no whole number."""
    width_L = end_L - begin_L
    if width_L.min() < 1 or width_L.max() > _MOST_DIGITS:
        return None
    value_L = np.zeros(len(begin_L), np.int64)
    for place in range(int(width_L.max())):
        is_inside_L = width_L > place
        digit_L = text[np.minimum(begin_L + place, end_L - 1)] - np.uint8(_ZERO)
        if (digit_L[is_inside_L] > 9).any():
            return None
        value_L = np.where(is_inside_L, value_L * 10 + digit_L, value_L)
    return value_L


def _first_bad_line(text: bytes, lines_before: int, columns: int, expected: str) -> str:
    # Not by splitlines, for which a lone carriage return ends a line.
    for number, line in enumerate(re.findall(rb"[^\n]*\n", text), lines_before + 1):
        fields = line[:-1].removesuffix(b"\r").split(b"\t")
        numbers = (fields[0], fields[-1])
        if len(fields) != columns or not all(f.isdigit() and len(f) <= _MOST_DIGITS for f in numbers):
            return f"line {number} is {line[:60]!r}, expected {expected}"
    raise AssertionError("no bad line in a text that has one")
