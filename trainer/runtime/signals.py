"""Told to stop: a signal sets a flag, the ranks agree on it, the run saves and leaves with exit code 75.

    with StopRequest() as stop:
        stop.signal          the number of the gravest signal so far, 0 if none; every step takes it along
    raise Stopped(...)       once the state is saved and the ranks have parted

A process takes them before it loads torch, which is most of its start.
Nothing happens inside a handler, and a second signal only sets the flag again. Whoever sent the first will
not wait for ever: a thread ends the process at the deadline, whatever it is doing then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

# EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again.
EXIT_CODE = 75
_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
# Rank 0 tidies up and goes first; its end would otherwise be cut short by that of the others.
_AFTER_RANK_0_S = 1.0
_POLL_S = 0.1


class Stopped(SystemExit):
    """The run was told to stop by signal `number` and has done so: an exit, not a failure.

    `is_first` on rank 0, which does what is to be done once.
    """

    def __init__(self, number: int, *, is_first: bool) -> None:
        super().__init__(EXIT_CODE)
        self.number, self.is_first = number, is_first


def name_of(number: int) -> str:
    """How a user calls a signal: SIGTERM, or Ctrl-C."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopRequest:
    """Takes the signals that ask a process to stop, while in the `with` block; main thread only."""

    def __init__(self) -> None:
        self.signal = 0
        self._first_s: float | None = None
        self._before: dict[int, Any] = {}
        self._is_first_rank, self._tidy = True, lambda reason: None
        self._once, self._is_over = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        # A run that was stopped is about to end with EXIT_CODE; another signal must not change that.
        if not self.signal and kind is not Stopped:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The gravest is the highest: 15 (TERM, as a job is cancelled), 12 and 10 (USR), 2 (Ctrl-C).
        self.signal = max(self.signal, number)
        self.start_clock()

    def start_clock(self) -> None:
        """The deadline counts from now, unless it does already; for ranks that have had no signal."""
        if self._first_s is None:
            self._first_s = time.monotonic()

    def keep_deadline(self, deadline_s: float, *, is_first: bool, tidy: Callable[[str], None]) -> None:
        """From now on end the process `deadline_s` after the first signal, as `give_up` does."""
        self._is_first_rank, self._tidy = is_first, tidy
        threading.Thread(target=self._watch, args=(deadline_s,), daemon=True).start()

    def _watch(self, deadline_s: float) -> None:
        while not self._is_over.wait(_POLL_S):
            if self._first_s is not None and time.monotonic() - self._first_s > deadline_s:
                self.give_up(f"there was no time for it (checkpoint.deadline_s is {deadline_s:g})")

    def give_up(self, reason: str) -> NoReturn:
        """End the process with EXIT_CODE at once; rank 0 first tidies, and is given the time for it."""
        self._once.acquire()  # and never released: the thread and the main thread may both come here
        if self._is_first_rank:
            self._tidy(reason)
        else:
            time.sleep(_AFTER_RANK_0_S)
        os._exit(EXIT_CODE)
