"""Graceful stop: a signal sets a flag, the ranks agree on it, the run saves and exits with code 75.

    with StopRequest() as stop:
        stop.signal          the highest signal number so far, 0 if none; every step reduces it over the ranks
    raise Stopped(...)       after the state is saved and the process group is destroyed

The handlers are installed before torch is imported, as the import takes most of the start. They only set the
flag. A thread ends the process at a deadline, because schedulers kill it soon after the first signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

# EX_TEMPFAIL of sysexits.h: a temporary condition, start the command again.
EXIT_CODE = 75
_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
# The other ranks wait for rank 0 to clean up, because their exit would cut its cleanup short.
_AFTER_RANK_0_S = 1.0
_POLL_S = 0.1


class Stopped(SystemExit):
    """The run has stopped because of signal `number`; it is an exit, not a failure.

    is_first: True on rank 0.
    """

    def __init__(self, number: int, *, is_first: bool) -> None:
        super().__init__(EXIT_CODE)
        self.number, self.is_first = number, is_first


def name_of(number: int) -> str:
    """Return the name of a signal for users: SIGTERM, or Ctrl-C for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopRequest:
    """Handler of the signals that stop a process, inside its `with` block; main thread only."""

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
        # A stopped run is about to exit with EXIT_CODE, and another signal must not change that.
        if not self.signal and kind is not Stopped:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The highest number has priority: 15 (TERM, for a cancelled job), 12 and 10 (USR), 2 (Ctrl-C).
        self.signal = max(self.signal, number)
        self.start_clock()

    def start_clock(self) -> None:
        """Start the deadline now, unless it has started; for ranks that have received no signal."""
        if self._first_s is None:
            self._first_s = time.monotonic()

    def keep_deadline(self, deadline_s: float, *, is_first: bool, tidy: Callable[[str], None]) -> None:
        """Start a thread that calls `give_up` at `deadline_s` seconds after the first signal.

        tidy: called with the reason on rank 0 before the exit.
        """
        self._is_first_rank, self._tidy = is_first, tidy
        threading.Thread(target=self._watch, args=(deadline_s,), daemon=True).start()

    def _watch(self, deadline_s: float) -> None:
        while not self._is_over.wait(_POLL_S):
            if self._first_s is not None and time.monotonic() - self._first_s > deadline_s:
                self.give_up(f"the deadline was exceeded (checkpoint.deadline_s is {deadline_s:g})")

    def give_up(self, reason: str) -> NoReturn:
        """End the process with EXIT_CODE at once; the other ranks give rank 0 time to call `tidy` first."""
        self._once.acquire()  # never released: the main thread and the deadline's thread can both get here
        if self._is_first_rank:
            self._tidy(reason)
        else:
            time.sleep(_AFTER_RANK_0_S)
        os._exit(EXIT_CODE)
