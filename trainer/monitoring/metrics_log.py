"""Records of a run: `metrics.jsonl`, one JSON object per line, and `result.json`, written at its end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic_write import staged_file

_METRICS, _RESULT = "metrics.jsonl", "result.json"


class MetricsLog:
    """Writer of a run's `metrics.jsonl`; every line has a `kind` and the `step` after which it was written.

    first_step: the step of the checkpoint from which the run resumes; lines of later steps are removed first,
    because the run repeats those steps. With 0 all lines are removed.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._path = run_dir / _METRICS
        kept = [record for record in read(run_dir) if first_step > 0 and record["step"] <= first_step]
        _replace(self._path, "".join(_line(record) for record in kept))
        self._file = open(self._path, "ab", buffering=0)
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
    """Return all records of a run, none if the file is missing; a truncated last line is omitted."""
    path = run_dir / _METRICS
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write `result.json`; the file appears only when it is complete."""
    _replace(run_dir / _RESULT, json.dumps(result, indent=2) + "\n")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _replace(path: Path, text: str) -> None:
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
