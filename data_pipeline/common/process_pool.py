"""A process pool that yields results in order and keeps only a few of them in memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Result = TypeVar("Result")

_AHEAD = 4  # maximum number of waiting results per process
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# For messages that name an image.
CRASHES = "expected an image, found one that ends the process that decodes it"


class WorkerDiedError(ChildProcessError):
    """A process ended in a call; `arguments` are those of one of the calls that it may have been."""

    def __init__(self, arguments: tuple) -> None:
        super().__init__(
            "a worker process ended unexpectedly: it crashed, or the system killed it for lack of memory; "
            "free memory and try again"
        )
        self.arguments = arguments


def in_order(
    call: Callable[..., Result], arguments: Iterable[tuple], processes: int | None = None
) -> Generator[Result]:
    """Yield `call(*a)` for each `a` of `arguments`, computed by `processes`, by default one for each core.

    An exception of a call is raised in place of its result, WorkerDiedError if a process ended in the call.
    """
    processes = processes or len(os.sched_getaffinity(0))
    pool = _pool(processes)
    calls = ((a, pool.submit(call, *a)) for a in arguments)
    waiting: deque[tuple[tuple, Future[Result]]] = deque()
    try:
        waiting.extend(islice(calls, _AHEAD * processes))
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
            waiting.extend(islice(calls, 1))
    except BrokenProcessPool as error:
        # The error says only that one of the processes has ended.
        unfinished = [a for a, _ in waiting]
        raise WorkerDiedError(first_crashing(call, unfinished) or unfinished[0]) from error
    finally:
        pool.shutdown(cancel_futures=True)


def first_crashing(call: Callable[..., object], arguments: Iterable[tuple]) -> tuple | None:
    """Return the first of `arguments` with which `call` ends its process; None if there is none."""
    with _pool(1) as pool:
        for a in arguments:
            error = pool.submit(call, *a).exception()
            if isinstance(error, BrokenProcessPool):
                return a
    return None


def _pool(processes: int) -> ProcessPoolExecutor:
    # A forked process lacks the threads of a DALI pipeline; it would wait for them if it collected a pipeline
    # that is garbage already.
    gc.collect()
    # The processes are forked: a spawned one imports the caller's modules first, which may include PyTorch.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start)


def _start() -> None:
    """Leave Ctrl-C to the parent, and end the process when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
