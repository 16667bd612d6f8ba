"""The function that every task of a job of `lgaf submit` runs.

1. Train, with the trainer's signal handlers in place of submitit's.
2. On SIGUSR1 or SIGUSR2 all ranks save together and stop.
3. One rank requeues the job, and submitit's batch script runs the same function again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.runtime.signals import EXIT_CODE, Stopped, StopRequest

# Not SIGTERM: with it, Slurm requeues or cancels the job by itself. submitit's own handler of SIGUSR2 would
# requeue at once, from inside the handler of rank 0, before the ranks have saved.
_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)


def train(config: Path, overrides: Sequence[str] = ()) -> None:
    """Run `trainer.entrypoints.train`, and requeue the job if SIGUSR1 or SIGUSR2 stopped it.

    A run that was stopped by a signal exits the process through `leave`, without Python's teardown. A run
    that finishes returns, so that submitit can write its result. A signal that arrives before submitit calls
    this function is not handled here.
    """
    try:
        with StopRequest() as stop:
            from trainer import entrypoints
            from trainer.runtime.ranks import leave

            entrypoints.train(config, overrides, stop)
    except Stopped as stopped:
        if stopped.is_first and stopped.number in _REQUEUE:
            print("lgaf: the job is requeued", file=sys.stderr, flush=True)
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        leave(EXIT_CODE)
