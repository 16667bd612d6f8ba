"""Records that cannot be read or decoded: left out, listed and counted, and borne only up to a share.

    {run_dir}/quarantine.jsonl      one line per record: file, key, offset, reason

Which sample takes the place of one whose record is bad is a function of positions alone (`substitutes`),
so no rank has to be told what another found, and a continued run finds the same again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# So many bad records are borne whatever the share: at the start of a run a share means nothing.
ALWAYS_BORNE = 10


class BadRecord(NamedTuple):
    """Where a record lies and why it cannot be used."""

    file: str
    key: int
    offset: int
    reason: str

    def line(self) -> str:
        """As a line of a list of them."""
        return json.dumps(self._asdict()) + "\n"

    def __str__(self) -> str:
        return f"{self.file}: key {self.key} at byte {self.offset}: {self.reason}"


class QuarantineError(ValueError):
    """More records are bad than the configuration bears; names the first ten."""


class Quarantine:
    """The bad records that one process has met, out of `seen` samples it has asked for.

    `path` is the list's file, to which the processes of a run append, each line in one write; None keeps it
    in memory alone. Every process bears `max_share` of its samples, and ten records in any case.
    """

    def __init__(self, path: Path | None, max_share: float) -> None:
        self._path, self._max_share = path, max_share
        self._found: dict[int, BadRecord] = {}
        self._seen = 0
        self._known_size = self._known_lines = 0
        self._before = set() if path is None else _lines(path)  # of an earlier life of the run

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, record: int) -> bool:
        return record in self._found

    def listed(self) -> int:
        """Bad records that the processes of the run have listed so far; the file is read if it has grown."""
        if self._path is None:
            return len(self)
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size != self._known_size:
            self._known_size, self._known_lines = size, len(_lines(self._path))
        return self._known_lines

    def count_seen(self, samples: int) -> None:
        """Take note that so many more samples have been asked for."""
        self._seen += samples

    def add(self, record: int, bad: BadRecord) -> None:
        """Leave a record out from now on. Raises QuarantineError if that is one too many."""
        if record in self._found:
            return
        self._found[record] = bad
        line = bad.line()
        if self._path is not None and line not in self._before:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        if len(self._found) > max(ALWAYS_BORNE, self._max_share * self._seen):
            first = list(self._found.values())[:10]
            raise QuarantineError(
                f"{len(self._found)} of the first {self._seen} samples cannot be read or decoded, more than "
                f"data.max_bad_share = {self._max_share:g} bears. Copy the dataset anew, run `lgaf data "
                "validate` on it, or raise the share. The first ten:\n"
                + "\n".join(f"  {one}" for one in first)
            )


def substitutes(sample: int, global_batch: int) -> Iterator[int]:
    """The samples to try for `sample`: itself, then those after it in its step, around its end to its start.

    Within the step, because the classes of a step are known beforehand from the labels of its samples.
    """
    start = sample // global_batch * global_batch
    for i in range(global_batch):
        yield start + (sample - start + i) % global_batch


def _lines(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return set(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True))
