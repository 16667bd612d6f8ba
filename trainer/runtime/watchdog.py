"""Watchdog: end the job when a rank dies or hangs, and report which rank it was.

    beat       a thread of every rank publishes the rank's last step, its activity, and a growing counter
    watch      another thread ends the process if the main thread makes no progress for too long
    verdict    the first rank to fail reads all published values twice: a rank whose counter has not grown is
               dead or stopped; if there is none, the rank that is furthest behind is the straggler

Every step synchronizes the ranks, so that a rank that hangs stops all of them and each detects it itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist

from data_pipeline.common import bounded_json

_BEAT_S = 1.0
_DIAGNOSIS_S = 2.5 * _BEAT_S
# From the loss of the store to the exit: in this time the main thread can report a more specific error.
_GRACE_S = 10.0
# The factor on the timeout while starting, evaluating and saving, which take longer than a step.
_PATIENCE = 3
_VERDICTS, _KEY = "lgaf/verdicts", "lgaf/life/{}"
_LIFE = [int, int, int, str, bool]


class HangError(RuntimeError):
    """No progress was made within the timeout, or the store was lost."""


class Verdict(NamedTuple):
    """The result of a diagnosis: True if this rank is the one to report, and the rank at fault, if found."""

    is_speaker: bool
    culprit: str


class _Life(NamedTuple):
    """The published state of a rank; `beat` grows while it lives, `progress` with each new activity."""

    beat: int = -1
    progress: int = -1
    step: int = 0
    doing: str = "never seen"
    has_left: bool = False

    def __str__(self) -> str:
        return f"after {self.step} steps, {self.doing}"


class Pulse:
    """The heartbeat of this rank, inside its `with` block.

    keeper: the name of the store's host, for messages. end: called with a HangError from a thread; it must
    end the process.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, keeper: str, end: Callable[[HangError], None]
    ) -> None:
        # The heartbeat goes through the store, because collectives hang when a rank does. It has a connection
        # of its own: the main thread's is in use while it waits for the other ranks to connect.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._world_size, self._keeper, self._end = rank, world_size, keeper, end
        self._timeout_s: float | None = None
        self._work, self._is_slow = (0, 0, "starting"), True
        self._has_left = False
        self._rank_0 = _Life()
        self._is_store_lost = False
        self._is_over = threading.Event()
        self._beating, self._watching = (
            threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)
        )

    def __enter__(self) -> Self:
        self._beating.start()
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        # Wait for the thread: Python's teardown aborts the process if the thread is in a call of the store.
        # The wait is limited because the store can hang.
        self._beating.join(_BEAT_S)

    def limit(self, timeout_s: float) -> None:
        """End the process after `timeout_s` without a call of `note`, or 3 times that in a slow activity."""
        self._timeout_s = timeout_s

    def note(self, step: int, doing: str, *, is_slow: bool = False) -> None:
        """Record that the main thread has started the activity `doing`, after `step` steps."""
        self._is_slow = is_slow
        self._work = (self._work[0] + 1, step, doing)

    def verdict(self, *, is_other_at_fault: bool) -> Verdict:
        """Diagnose a failure, once, when this rank fails; takes seconds if another rank seems at fault."""
        found: list[Verdict] = []
        # In a thread, which is abandoned if the store does not respond.
        asking = threading.Thread(target=self._diagnose, args=(is_other_at_fault, found), daemon=True)
        asking.start()
        asking.join(4 * _DIAGNOSIS_S)
        if found:
            return found[0]
        # Without the store the ranks cannot agree on one to report, so that rank 1 does. Rank 0, if it is
        # alive, hosts the store or has lost it with torchrun.
        return Verdict(
            self._rank == 1, f"{self._keeper} is dead or stopped; rank 0 was last seen {self._rank_0}"
        )

    def _diagnose(self, is_other_at_fault: bool, found: list[Verdict]) -> None:
        with contextlib.suppress(RuntimeError):  # the store was lost
            is_speaker = self._store.add(_VERDICTS, 1) == 1
            culprit = self._culprit() if is_speaker and is_other_at_fault else ""
            # Other ranks must not diagnose this rank as dead.
            self._has_left = True
            self._publish(beat=0)
            found.append(Verdict(is_speaker, culprit))

    def _culprit(self) -> str:
        before = self._read_all()
        time.sleep(_DIAGNOSIS_S)
        after = self._read_all()
        others = [rank for rank in after if rank != self._rank and not after[rank].has_left]
        silent = [rank for rank in others if after[rank].beat == before[rank].beat]
        if silent:
            return "; ".join(f"rank {r} is dead or stopped; it was last seen {after[r]}" for r in silent)
        least = min(after, key=lambda r: after[r].progress)
        return f"rank {least} is furthest behind: {after[least]}"

    def _read_all(self) -> dict[int, _Life]:
        return {rank: self._read(rank) for rank in range(self._world_size)}

    def _read(self, rank: int) -> _Life:
        """Return the published state of a rank; the default if there is none, or one of another form."""
        key = _KEY.format(rank)
        if self._store.check([key]):
            with contextlib.suppress(ValueError):
                values = bounded_json.parse(self._store.get(key))
                if isinstance(values, list) and [*map(type, values)] == _LIFE:
                    return _Life(*values)
        return _Life()

    def _publish(self, beat: int) -> None:
        self._store.set(_KEY.format(self._rank), json.dumps([beat, *self._work, self._has_left]))

    def _beat(self) -> None:
        try:
            for beat in itertools.count():
                self._publish(beat)
                self._rank_0 = self._read(0)
                if self._is_over.wait(_BEAT_S):
                    return
        except RuntimeError:
            self._is_store_lost = True

    def _watch(self) -> None:
        """End the process after too long without progress, or some time after the loss of the store.

        Time is counted in the loop's own ticks, so that the time of a suspended job does not count. The loop
        never calls the store, which can hang.
        """
        seen, idle_s, lost_s = -1, 0.0, 0.0
        while not self._is_over.wait(_BEAT_S):
            progress = self._work[0]
            idle_s = idle_s + _BEAT_S if progress == seen else 0.0
            lost_s = lost_s + _BEAT_S if self._is_store_lost else 0.0
            seen = progress
            allowed_s = (self._timeout_s or 0) * (_PATIENCE if self._is_slow else 1)
            if lost_s > _GRACE_S:
                self._end(HangError(f"the connection to {self._keeper} was lost"))
            if self._timeout_s is not None and idle_s > allowed_s:
                self._end(HangError(f"no progress was made for {allowed_s:g} s (watchdog.timeout_s)"))
