"""A rank that dies or hangs does not leave the others waiting: the job ends, and says which rank it was.

    beat       a thread of every rank publishes the rank's last step, what it does, and a number that grows
    watch      another looks whether the main thread gets anywhere; if not for too long, the process ends
    verdict    the first rank to end reads all that was published, twice: a rank whose number stands still is
               dead or stopped; if there is none, the rank that got least far keeps the others waiting

Steps keep the ranks together, so a rank that hangs stops all of them, and each sees it by itself. What is
published is in the store in which the ranks met: messages of the training's process group hang when a rank
does. The store may hang or go too, with rank 0 or torchrun, whichever keeps it; so the thread that watches
never waits for it.
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

_BEAT_S = 1.0
_DIAGNOSIS_S = 2.5 * _BEAT_S
# From the loss of the store to the end: the main thread may have a better word to say.
_GRACE_S = 10.0
# Starting, evaluating and saving are not measured in steps.
_PATIENCE = 3
_VERDICTS, _KEY = "lgaf/verdicts", "lgaf/life/{}"


class HangError(RuntimeError):
    """Nothing was done for too long."""


class Verdict(NamedTuple):
    """Whether this rank is the one to speak, and which other rank is at fault, if one was found."""

    is_speaker: bool
    culprit: str


class _Life(NamedTuple):
    """What a rank publishes; `beat` grows while it lives, `progress` whenever it gets to something else."""

    beat: int = -1
    progress: int = -1
    step: int = 0
    doing: str = "never seen"
    has_left: bool = False

    def __str__(self) -> str:
        return f"after {self.step} steps, {self.doing}"


class Pulse:
    """The life signs of this rank, while in the `with` block.

    keeper: who keeps the store, for people. end: called with a HangError, from a thread; it ends the process.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, keeper: str, end: Callable[[HangError], None]
    ) -> None:
        # A connection of its own: the main thread's may be in use for as long as ranks take to meet.
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
        # It may be in the store, and Python's teardown abort the process for it; but the store may hang.
        self._beating.join(_BEAT_S)

    def limit(self, timeout_s: float) -> None:
        """From now on the process ends after so long without a note, thrice so long where that is slow."""
        self._timeout_s = timeout_s

    def note(self, step: int, doing: str, *, is_slow: bool = False) -> None:
        """The main thread has got to something else, `step` steps being done."""
        self._is_slow = is_slow
        self._work = (self._work[0] + 1, step, doing)

    def verdict(self, *, is_other_at_fault: bool) -> Verdict:
        """To be asked once, when this rank fails; takes seconds if another rank seems to be the cause."""
        found: list[Verdict] = []
        # In a thread, which is left behind if the store does not answer.
        asking = threading.Thread(target=self._judge, args=(is_other_at_fault, found), daemon=True)
        asking.start()
        asking.join(4 * _DIAGNOSIS_S)
        if found:
            return found[0]
        # Nobody can be asked who speaks. Rank 0, if it lives, keeps the store or lost it with torchrun.
        return Verdict(
            self._rank == 1, f"{self._keeper} is gone or stopped; rank 0 was last seen {self._rank_0}"
        )

    def _judge(self, is_other_at_fault: bool, found: list[Verdict]) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            is_speaker = self._store.add(_VERDICTS, 1) == 1
            culprit = self._culprit() if is_speaker and is_other_at_fault else ""
            # The others' verdict need not wonder why this rank is silent.
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
        return f"rank {least} got least far: {after[least]}"

    def _read_all(self) -> dict[int, _Life]:
        return {rank: self._read(rank) for rank in range(self._world_size)}

    def _read(self, rank: int) -> _Life:
        key = _KEY.format(rank)
        return _Life(*json.loads(self._store.get(key))) if self._store.check([key]) else _Life()

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
        """Time is counted in own ticks, not by a clock: a job that was suspended has not been idle."""
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
                self._end(HangError(f"nothing was done for {allowed_s:g} s (watchdog.timeout_s)"))
