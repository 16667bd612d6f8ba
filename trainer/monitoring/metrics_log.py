"""What a run leaves behind besides weights: `metrics.jsonl`, one JSON object a line, and `result.json`."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

_METRICS, _RESULT = "metrics.jsonl", "result.json"


class Records:
    """Appends to a run's `metrics.jsonl`; every line has a `kind` and the `step` after which it was written.

    A run that goes on from a checkpoint at step `first_step` first drops the lines of later steps, which
    another life of it wrote after that checkpoint and which will be written again.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._path = run_dir / _METRICS
        kept = [record for record in read(run_dir) if first_step > 0 and record["step"] <= first_step]
        _replace(self._path, "".join(_line(record) for record in kept))
        self._file = open(self._path, "ab", buffering=0)
        self._waiting = b""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record; it is in the file when this returns, or when there is room on a full disk.

        A checkpoint that fills the disk goes again; nothing else must fail because of it.
        """
        self._waiting += _line({"kind": kind, "step": step, **values}).encode()
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run; none if it has not begun. A last line that was cut off is left out."""
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
    """Write `result.json`; it appears only when complete."""
    _replace(run_dir / _RESULT, json.dumps(result, indent=2) + "\n")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
