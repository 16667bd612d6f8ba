"""A process pool that yields results in order and keeps only a few of them in memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

Result = TypeVar("Result")

_AHEAD = 4  # maximum number of waiting results per process
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def in_order(
    call: Callable[..., Result], arguments: Iterable[tuple], processes: int | None = None
) -> Generator[Result]:
    """Yield `call(*a)` for each `a` of `arguments`, computed by `processes`, by default one for each core.

    An exception of a call is raised in place of its result.
    """
    processes = processes or len(os.sched_getaffinity(0))
    # The processes are forked: a spawned one imports the caller's modules first, which may include PyTorch.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start)
    calls = (pool.submit(call, *a) for a in arguments)
    try:
        waiting = deque(islice(calls, _AHEAD * processes))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(calls, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Leave Ctrl-C to the parent, and end the process when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
