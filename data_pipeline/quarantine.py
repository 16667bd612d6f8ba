"""Bad records, which cannot be read or decoded: they are skipped, listed, and tolerated up to a share.

    {run_dir}/quarantine.jsonl      one line per record: file, key, offset, reason

The substitute for a sample with a bad record is a function of positions alone (`substitutes`). So ranks need
not exchange their bad records, and a resumed run chooses the same substitutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.atomic_write import open_to_append
from data_pipeline.common.data_file import lines_of
from data_pipeline.common.terminal import echo

# Number of bad records that is always tolerated: at the start of a run a share of the samples is too coarse.
ALWAYS_TOLERATED = 10
_MOST_LINE_CHARS = 1 << 16


class BadRecord(NamedTuple):
    """The position of a record, and the reason why it cannot be used."""

    file: str
    key: int
    offset: int
    reason: str

    def line(self) -> str:
        """Return the record as a line of quarantine.jsonl."""
        return json.dumps(self._asdict()) + "\n"

    def __str__(self) -> str:
        return f"{self.file}: key {self.key} at byte {self.offset}: {self.reason}"


class QuarantineError(ValueError):
    """The number of bad records exceeds the configured share; the message names the first ten."""


class Quarantine:
    """The bad records that one process has found among its samples.

    `path` is the file of the list, to which all processes of a run append, each line in one write; with None
    the list is only in memory. Every process tolerates `max_share` of its samples, and ten records in any
    case.
    """

    def __init__(self, path: Path | None, max_share: float) -> None:
        self._path, self._max_share = path, max_share
        self._found: dict[int, BadRecord] = {}
        self._seen = 0
        self._known_size = self._known_lines = 0
        self._is_complete = True
        self._before = set() if path is None else _lines(path)  # before a restart of the run

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, record: int) -> bool:
        return record in self._found

    def listed(self) -> int:
        """Return the number of bad records listed by all processes; the file is read if it has grown."""
        if self._path is None:
            return len(self)
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size != self._known_size:
            self._known_size, self._known_lines = size, len(_lines(self._path))
        return max(self._known_lines, len(self))

    def count_seen(self, samples: int) -> None:
        """Count `samples` more samples as requested."""
        self._seen += samples

    def add(self, record: int, bad: BadRecord) -> None:
        """Exclude a record from now on. Raises QuarantineError if the bad records exceed the limit."""
        if record in self._found:
            return
        self._found[record] = bad
        line = bad.line()
        if self._path is not None and line not in self._before:
            self._append(self._path, line)
        if len(self._found) > max(ALWAYS_TOLERATED, self._max_share * self._seen):
            first = list(self._found.values())[:10]
            raise QuarantineError(
                f"{len(self._found)} of the first {self._seen} samples cannot be read or decoded, which "
                f"exceeds data.max_bad_share = {self._max_share:g}. Copy the dataset again, run `lgaf data "
                "validate` on it, or raise the share. The first ten:\n"
                + "\n".join(f"  {one}" for one in first)
            )

    def _append(self, path: Path, line: str) -> None:
        """Append a line to the list. The first failure is shown; none ends the run."""
        try:
            handle = open_to_append(path)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            if self._is_complete:
                echo(f"lgaf: {path}: bad records are skipped but not listed: {error}", err=True)
            self._is_complete = False


def substitutes(sample: int, global_batch: int) -> Iterator[int]:
    """Yield the samples to try for `sample`: itself, then the following ones of its step, cyclically.

    A substitute comes from the same step, because the set of classes of a step is computed beforehand from
    the labels of its samples.
    """
    start = sample // global_batch * global_batch
    for i in range(global_batch):
        yield start + (sample - start + i) % global_batch


def _lines(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return set(lines_of(path, _MOST_LINE_CHARS, encoding="utf-8", errors="replace"))
