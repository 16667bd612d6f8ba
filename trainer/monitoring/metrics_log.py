"""Records of a run: `metrics.jsonl`, one JSON object per line, and `result.json`, written at its end."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.common import bounded_json
from data_pipeline.common.atomic_write import open_to_append, staged_file
from data_pipeline.common.data_file import open_data_file

_METRICS, _RESULT = "metrics.jsonl", "result.json"
_LONGEST_LINE = 1 << 16
_LARGEST_STEP = 1 << 53
# Differences and ratios of such numbers are finite, and no logarithm of them fails.
_SMALLEST, _LARGEST = 1e-100, 1e100


class MetricsLog:
    """Writer of a run's `metrics.jsonl`; every line has a `kind` and the `step` after which it was written.

    first_step: the step of the checkpoint from which the run resumes; lines of later steps are removed first,
    because the run repeats those steps. With 0 all lines are removed. `unreadable` lines were removed because
    they are no records.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._path = run_dir / _METRICS
        records, self.unreadable = read_counted(run_dir)
        kept = [record for record in records if first_step > 0 and record["step"] <= first_step]
        _replace(self._path, "".join(_line(record) for record in kept))
        self._file = open(open_to_append(self._path), "ab", buffering=0)
        self._waiting = b""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record. On a full disk it is kept in memory and written with a later record.

        A full disk must not end the run: the checkpoint that filled it is removed when its save fails.
        """
        self._waiting += _line({"kind": kind, "step": step, **values}).encode()
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return all records of a run, none if the file is missing; lines that are no records are skipped."""
    return read_counted(run_dir)[0]


def read_counted(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Return all records of a run, and the number of lines that are no records.

    A crash can truncate a line, to which the next record is then appended. Every record has a text `kind`, an
    integer `step`, and otherwise texts and numbers, which are 0, non-finite or of a usual magnitude.
    """
    path = run_dir / _METRICS
    if not path.is_file():
        return [], 0
    found = [_record(line) for line in _lines(path) if line.strip()]
    records = [record for record in found if record is not None]
    return records, len(found) - len(records)


def is_number(value: object) -> bool:
    """Return True for a finite number of a usual magnitude."""
    return _is_plain(value) and isinstance(value, int | float) and math.isfinite(value)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines; one that is too long for a record is yielded without its end."""
    with open_data_file(path) as file:
        while line := file.readline(_LONGEST_LINE):
            yield line
            while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                line = file.readline(_LONGEST_LINE)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = bounded_json.parse(line)
    except ValueError:
        return None
    match record:
        case {"kind": str(), "step": int() as step} if 0 <= step < _LARGEST_STEP:
            return record if all(map(_is_plain, record.values())) else None
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value == 0 or _SMALLEST <= abs(value) <= _LARGEST
    return value is None or isinstance(value, str)


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write `result.json`; the file appears only when it is complete."""
    _replace(run_dir / _RESULT, json.dumps(result, indent=2) + "\n")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _replace(path: Path, text: str) -> None:
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
