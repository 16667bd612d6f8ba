"""Kill a random rank of a running training again and again; at the end, compare with a run left in peace.

    python -m tests.trainer.soak --kills 50        or: make soak
    python -m tests.trainer.soak --every-s 40      how much of its time is of use, and how much was expected

torchrun starts the ranks anew after each kill. A kill comes after the run has got further than before: at a
random time, or, every second one, while a checkpoint is being written; some follow while it starts again.
With --every-s they come as failures do, at any time, and benchmarks/goodput.py is asked for its opinion.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import re
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.goodput import goodput
from data_pipeline.synthetic.dataset import write_set
from tests.trainer.conftest import SMALL, command, environment, losses, train_words
from tests.trainer.processes import children, state_of
from trainer.monitoring import metrics_log

STEPS_BETWEEN_KILLS = 6
STEPS_BETWEEN_SAVES = 20  # where kills come at any time
KILL_WITHIN_S = 1.5
STARTING_S = 8.0
AGAIN_SHARE = 0.2
OPTIONS = ("checkpoint.every_steps=1", "evaluation.sets=[]", "log_every_steps=1", "head.sample_rate=0.5")


class Outcome(NamedTuple):
    """Of a run: kills, those of them while a checkpoint was being written, steps computed, seconds."""

    kills: int
    while_saving: int
    computed: int
    wall_s: float


def train(run_dir: Path, data: Path, steps: int, kills: int, seed: int) -> Outcome:
    """A whole training of two ranks, of which `kills` times one is killed."""
    words = train_words(run_dir, data, *OPTIONS, f"steps={steps}")
    dice, started = random.Random(seed), time.monotonic()
    reached: list[int] = []
    lives: dict[int, int] = {}  # number of a process that began to train -> the last step it recorded
    saving = 0
    log = run_dir.with_suffix(".log")
    process = start(words, log, kills)
    while len(reached) < kills and process.poll() is None:
        is_again = len(reached) > 0 and dice.random() < AGAIN_SHARE
        if is_again:
            time.sleep(dice.uniform(0, STARTING_S))
        else:
            goal = len(reached) * STEPS_BETWEEN_KILLS + 1
            while last_step(run_dir) < goal and process.poll() is None:
                time.sleep(0.01)
        victims = children(process)
        if not is_again and len(reached) % 2:
            while not is_saving(run_dir) and process.poll() is None:
                pass
        elif not is_again:
            time.sleep(dice.uniform(0, KILL_WITHIN_S))
        if len(victims) < 2:
            continue  # torchrun is just starting them
        is_amid_saving = is_saving(run_dir)
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(victims), signal.SIGKILL)
            saving += is_amid_saving
            reached.append(last_step(run_dir))
            lives[len(first_steps(log))] = reached[-1]
            while set(victims) & set(children(process)):
                time.sleep(0.05)
    assert process.wait() == 0, log.read_text()
    firsts = first_steps(log)
    # A process that was killed before it printed its first step has changed nothing.
    lives = {len(firsts): steps} | {number: end for number, end in lives.items() if 0 < number < len(firsts)}
    computed = sum(end - firsts[number - 1] for number, end in lives.items())
    return Outcome(len(reached), saving, computed, time.monotonic() - started)


def start(words: list[str], log: Path, restarts: int) -> subprocess.Popen[bytes]:
    """Two ranks under torchrun, which starts them again."""
    launch = command(*words, ranks=2)
    launch.insert(launch.index("--standalone"), f"--max-restarts={restarts}")
    with open(log, "w") as said:
        return subprocess.Popen(launch, env=environment(), stdout=subprocess.DEVNULL, stderr=said)


def is_saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(run_dir.glob("checkpoints/.*.part"))


def first_steps(log: Path) -> list[int]:
    """Return the first step of each process of a run that began to train."""
    return list(map(int, re.findall(r"; steps (\d+) to", log.read_text())))


def last_step(run_dir: Path) -> int:
    """The last step recorded, 0 before there is one; a line that is being written does not count."""
    with contextlib.suppress(OSError, ValueError):
        return max(losses(run_dir), default=0)
    return 0


def compare(disturbed_dir: Path, peaceful_dir: Path) -> None:
    """Raise AssertionError unless losses and final state are the same, and nothing temporary is left."""
    assert losses(disturbed_dir) == losses(peaceful_dir)
    last = f"step-{max(losses(peaceful_dir)):08d}"
    found, expected = (state_of(run / "checkpoints" / last) for run in (disturbed_dir, peaceful_dir))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "running_" in name:  # averaged over ranks when saved: the same to rounding
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found[name], tensor), name
    names = sorted(path.name for path in disturbed_dir.rglob("*") if "step-" not in path.parent.name)
    assert names == sorted(path.name for path in peaceful_dir.rglob("*") if "step-" not in path.parent.name)


def soak(folder: Path, data: Path, kills: int, seed: int) -> str:
    """Compare a disturbed and an undisturbed run; return a description of the differences."""
    steps = STEPS_BETWEEN_KILLS * (kills + 1)
    peaceful = train(folder / "peaceful", data, steps, 0, seed)
    disturbed = train(folder / "disturbed", data, steps, kills, seed)
    assert disturbed.kills == kills, f"the run ended after {disturbed.kills} of {kills} kills"
    compare(folder / "disturbed", folder / "peaceful")
    return (
        f"{kills} kills, {disturbed.while_saving} of them while saving: the same losses and final state; "
        f"useful: {steps / disturbed.computed:.0%} of the {disturbed.computed} steps computed, "
        f"{peaceful.wall_s / disturbed.wall_s:.0%} of {disturbed.wall_s:.0f} s"
    )


def useful_share(folder: Path, data: Path, mean_s: float, seed: int, steps: int, every_steps: int) -> str:
    """A run that is killed every `mean_s` seconds on average: its useful time, measured and expected.

    Useful are `steps` times what a step takes in this run when none fails, hold-ups by checkpoints included.
    A restart is measured from the kill to the end of the first step after it, less one step.
    """
    run_dir, dice = folder / "run", random.Random(seed)
    options = (*OPTIONS, f"checkpoint.every_steps={every_steps}", f"steps={steps}")
    began = time.time()
    process = start(train_words(run_dir, data, *options), folder / "run.log", 1000)
    kills = []
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=dice.expovariate(1 / mean_s))
        victims = children(process)
        if victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(victims), signal.SIGKILL)
                kills.append(time.time())
    wall_s = time.time() - began
    ends = sorted(record["time_s"] for record in metrics_log.read(run_dir) if record["kind"] == "train")
    step_s = statistics.mean(
        after - before
        for before, after in itertools.pairwise(ends)
        if not any(before < killed < after for killed in kills)
    )
    starts = [
        next(end for end in [*ends, math.inf] if end > killed) - killed - step_s
        for killed, next_kill in itertools.pairwise([*kills, math.inf])
        if any(killed < end < next_kill for end in ends)
    ]
    restart_s = statistics.mean(starts)
    expected = goodput(
        every_steps * step_s, hold_s=0, restart_s=restart_s, mean_time_between_failures_s=wall_s / len(kills)
    )
    return (
        f"{len(kills)} kills in {wall_s:.0f} s, {restart_s:.1f} s to start again, "
        f"{steps} steps of {step_s:.3f} s, "
        f"a checkpoint every {every_steps}: useful {steps * step_s / wall_s:.1%}, expected {expected:.1%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every-s", type=float, help="mean time between kills that come at any time")
    parser.add_argument("--steps", type=int, default=3000, help="length of the run, with --every-s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = Path(temporary), Path(temporary) / "set"
        write_set(data, SMALL)
        if given.every_s is None:
            print(soak(folder, data, given.kills, given.seed))
        else:
            print(useful_share(folder, data, given.every_s, given.seed, given.steps, STEPS_BETWEEN_SAVES))
