"""Real trainings that are watched, and that something is done to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.trainer.conftest import environment
from trainer.checkpoint import directory, storage


def start(words: Sequence[str | Path], **variables: str) -> subprocess.Popen[str]:
    """Start a command and capture its standard error."""
    return subprocess.Popen(
        list(map(str, words)),
        env=environment() | variables,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def children(process: subprocess.Popen[Any]) -> list[int]:
    """Process numbers of torchrun's ranks, lowest first."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True)
    return sorted(map(int, listed.stdout.split()))


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen[str],
    timeout_s: float = 180,
    pause_s: float = 0.02,
) -> None:
    """Wait until the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended too early:\n{process.communicate()[1]}")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause_s)


LGAF = "from trainer.__main__ import main; main()"
SUBMITIT = "import pathlib, sys, slurm.task as job; job.train(pathlib.Path(sys.argv[2]), sys.argv[4::2])"


def patched(folder: Path, code: str, *, ranks: int = 1, starter: str = LGAF) -> list[str | Path]:
    """`lgaf`, alone or under torchrun, in processes that run `code` first: how a test injects a fault.

    Or what submitit calls, for the same words of a training.
    """
    script = folder / "patched.py"
    script.write_text(f"{textwrap.dedent(code)}\n{starter}\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), script]


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill torchrun and its ranks, which are not its process group."""
    for pid in [*children(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name, whole."""
    table = directory.read_manifest(checkpoint).tensors
    state = {name: torch.empty(held.shape, dtype=getattr(torch, held.dtype)) for name, held in table.items()}
    storage.read(checkpoint, state, table)
    return state
