"""One function over many arguments, in several processes, results in order and only a few in memory."""

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

_AHEAD = 4  # results per process that may wait to be taken
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def in_order(
    call: Callable[..., Result], arguments: Iterable[tuple], processes: int | None = None
) -> Generator[Result]:
    """Yield `call(*a)` for each `a` of `arguments`, computed by `processes`, by default one for each core.

    What a call raises is raised here, at its turn.
    """
    processes = processes or len(os.sched_getaffinity(0))
    # Forked: a spawned process first imports all that the caller has, which may be all of PyTorch.
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
    """Ctrl-C is the parent's to handle; a process whose parent was killed ends as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
