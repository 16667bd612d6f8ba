"""Real trainings that are watched, and that something is done to."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.trainer.conftest import environment


def start(words: Sequence[str | Path], **variables: str) -> subprocess.Popen[str]:
    """Start a command; what it says on standard error is kept."""
    return subprocess.Popen(
        list(map(str, words)),
        env=environment() | variables,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of torchrun's ranks, lowest first."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True)
    return sorted(map(int, listed.stdout.split()))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Wait until the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended too early:\n{process.communicate()[1]}")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
