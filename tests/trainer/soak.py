"""Kill a random rank of a running training again and again; at the end, compare with a run left in peace.

    python -m tests.trainer.soak --kills 50        or: make soak

torchrun starts the ranks anew after each kill. A kill comes at a random time after the run has got a step
further than before; every few of them, another follows while the run is starting again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.synthetic_set import write_set
from tests.trainer.conftest import SMALL, command, losses, train_words
from tests.trainer.processes import children, start, state_of

STEPS_BETWEEN_KILLS = 6
KILL_WITHIN_S = 1.5
STARTING_S = 8.0
AGAIN_SHARE = 0.2
OPTIONS = ("checkpoint.every_steps=2", "evaluation.sets=[]", "log_every_steps=1", "head.sample_rate=0.5")


class Outcome(NamedTuple):
    """Of a run: kills, those of them while a checkpoint was being written, steps done again, seconds."""

    kills: int
    while_saving: int
    steps_lost: int
    wall_s: float


def disturbed(run_dir: Path, data: Path, kills: int, seed: int) -> Outcome:
    """Train while killing; the end of the run is awaited."""
    steps = STEPS_BETWEEN_KILLS * (kills + 1)
    words = command(*train_words(run_dir, data, *OPTIONS, f"steps={steps}"), ranks=2)
    words.insert(words.index("--standalone"), f"--max-restarts={kills + 1}")
    dice, started, reached = random.Random(seed), time.monotonic(), []
    saving = done = 0
    with tempfile.TemporaryFile("w+") as log, start(words, stderr=log) as process:
        while done < kills and process.poll() is None:
            is_again = done > 0 and dice.random() < AGAIN_SHARE
            if is_again:
                time.sleep(dice.uniform(0, STARTING_S))
            else:
                goal = done * STEPS_BETWEEN_KILLS + 1
                while last_step(run_dir) < goal and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(dice.uniform(0, KILL_WITHIN_S))
            if not (ranks := children(process)):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(ranks), signal.SIGKILL)
                saving += bool(list(run_dir.glob("checkpoints/.*.part")))
                reached.append(last_step(run_dir))
                done += 1
        process.wait()
        log.seek(0)
        said = log.read()
    assert process.returncode == 0, said
    # A life that was killed before it began has done nothing, so nothing was lost.
    first_steps = list(map(int, re.findall(r"; steps (\d+) to", said)))[1:]
    lost = sum(max(0, end - first) for end, first in zip(sorted(set(reached)), first_steps, strict=False))
    return Outcome(done, saving, lost, time.monotonic() - started)


def last_step(run_dir: Path) -> int:
    """The last step recorded, 0 before there is one; a line that is being written does not count."""
    with contextlib.suppress(OSError, ValueError):
        return max(losses(run_dir), default=0)
    return 0


def compare(disturbed_dir: Path, peaceful_dir: Path, folder: Path) -> None:
    """Raise AssertionError unless losses and final state are the same, and nothing temporary is left."""
    assert losses(disturbed_dir) == losses(peaceful_dir)
    last = f"step-{max(losses(peaceful_dir)):08d}"
    found, expected = (state_of(run / "checkpoints" / last, folder) for run in (disturbed_dir, peaceful_dir))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "running_" in name:  # averaged over ranks when saved: the same to rounding
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found[name], tensor), name
    names = sorted(path.name for path in disturbed_dir.rglob("*") if "step-" not in path.parent.name)
    assert names == sorted(path.name for path in peaceful_dir.rglob("*") if "step-" not in path.parent.name)


def soak(folder: Path, data: Path, kills: int, seed: int) -> str:
    """Both runs and the comparison; returns the line that sums it up."""
    peaceful = disturbed(folder / "peaceful", data, 0, seed)
    # As long as the disturbed one: its number of steps follows from the kills.
    raise NotImplementedError(peaceful)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
