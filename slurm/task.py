"""What every task of a job does that `lgaf submit` has submitted: train, and queue again if told to stop.

submitit would requeue on SIGUSR2 itself, but at once and from inside the handler of rank 0. The trainer's own
handlers replace its, so that the ranks save together first; here the job is then put back into the queue,
where submitit's batch script makes the same call again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.runtime.signals import EXIT_CODE, Stopped, StopRequest

# With a signal to terminate, Slurm requeues the job or cancels it by itself.
_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)


def train(config: Path, overrides: Sequence[str] = ()) -> None:
    """As `trainer.entrypoints.train`, but a run that was told to stop by SIGUSR1 or SIGUSR2 is requeued.

    A run that was told to stop ends the process. One that ends by itself returns, for submitit to write down
    its result; the teardown of Python, which `leave` avoids, comes after that. A signal before submitit makes
    this call is taken by nobody here.
    """
    try:
        with StopRequest() as stop:
            from trainer import entrypoints as job
            from trainer.runtime.ranks import leave

            job.train(config, overrides, stop)
    except Stopped as stopped:
        if stopped.is_first and stopped.number in _REQUEUE:
            print("lgaf: the job queues again", file=sys.stderr, flush=True)
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        leave(EXIT_CODE)
