"""Benchmark of saving a checkpoint: delay of a step and total time, compared with other ways to save.

    python benchmarks/checkpoint.py --folder DIR --json benchmarks/results/checkpoint_cpu.json

One rank with a head of `--classes` x `--dim` rows and their momentum, and an iresnet of `--depth` with its
own. The variants take turns for `--rounds` rounds. Each writes into a new folder in DIR after the disk has
finished all earlier writes. Times are medians over the rounds.

    raw           the same bytes from the same memory into one file, then fsync
    raw, brisk    the same through WriteThroughFile of trainer/checkpoint/checksummed_file.py, which
                  checkpoints use
    insightface   torch.save of the dictionary that train_v2.py of deepinsight/insightface saves on each rank:
                  state dicts of the partial fc, the backbone and the optimizer. As there, without fsync and
                  checksums; a kill during the write leaves a broken file under the final name
    synchronous   trainer/checkpoint/sharded.py in the training's thread: checksums, manifest, fsync, rename
    beside        trainer/checkpoint/async_saver.py, as in training: the step waits for the copy, and a thread
                  writes it. The copy's memory is allocated before; the time for this is reported too

Nothing is trained meanwhile, so the total of `beside` is that of a machine with a free core. The goodput
table is computed by benchmarks/goodput.py from these measurements and a restart time of `--restart-s`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.goodput import best_interval, goodput
from partial_fc.collectives import logical
from trainer import backbones
from trainer.checkpoint import sharded
from trainer.checkpoint.async_saver import Saver
from trainer.checkpoint.checksummed_file import WriteThroughFile
from trainer.checkpoint.directory import Header
from trainer.checkpoint.sharded import State
from trainer.config import CheckpointConfig
from trainer.monitoring.prometheus import Metrics

HOUR_S = 3600
FAILURES_EVERY_H = (1, 4, 24, 24 * 7)
HEADER = Header(1, {}, {}, {})
PIECE = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Timing of one variant: delay of a step, time until all is written, bytes on disk; the least and the
    largest total of all rounds."""

    held_s: float
    total_s: float
    disk_bytes: int
    least_s: float
    largest_s: float


def make_state(classes: int, dim: int, depth: int) -> State:
    """Return the state of a run with one rank, filled with random numbers."""
    network = sharded.backbone_state(
        backbones.build(backbones.parse({"name": "iresnet", "depth": depth}), 112)
    )
    rows = {name: torch.empty(classes, dim).normal_(std=0.01) for name in ("weight", "momentum")}
    return {
        **network,
        "backbone_momentum": {name: torch.randn_like(t) for name, t in network["backbone_weight"].items()},
        "head": {name: logical(tensor, classes, dist.group.WORLD) for name, tensor in rows.items()},
    }


def local(state: State) -> State:
    """Return the state with plain tensors."""
    return {
        part: {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors.items()}
        for part, tensors in state.items()
    }


def save_raw(folder: Path, state: State, *, write_through: bool = False) -> float:
    """Write the tensors' bytes into one file; return the caller's delay in seconds, as all `save_` do."""
    started = time.perf_counter()
    with open(folder / "raw", "wb") as raw:
        file = WriteThroughFile(raw) if write_through else raw
        for tensors in local(state).values():
            for tensor in tensors.values():
                data = memoryview(tensor.contiguous().view(-1).numpy()).cast("B")
                # In pieces, so that the disk starts writing before all bytes are passed to the kernel.
                for start in range(0, len(data), PIECE):
                    file.write(data[start : start + PIECE])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def save_as_insightface(folder: Path, state: State) -> float:
    plain = local(state)
    started = time.perf_counter()
    torch.save(
        {
            "epoch": 1,
            "global_step": 1,
            "state_dict_backbone": {**plain["backbone_weight"], **plain["backbone_buffer"]},
            "state_dict_softmax_fc": {"weight": plain["head"]["weight"]},
            "state_optimizer": {**plain["backbone_momentum"], "softmax_fc": plain["head"]["momentum"]},
        },
        folder / "checkpoint_gpu_0.pt",
    )
    return time.perf_counter() - started


def save_synchronously(folder: Path, state: State) -> float:
    started = time.perf_counter()
    sharded.save(folder, state, HEADER, keep=1, group=dist.group.WORLD)
    return time.perf_counter() - started


def measure(folder: Path, save: Callable[[Path], tuple[float, Callable[[], None]]]) -> Timing:
    """Time one save; `save` returns its caller's delay in seconds and a function that waits for its end."""
    os.sync()
    started = time.perf_counter()
    held_s, wait = save(folder)
    wait()
    total_s = time.perf_counter() - started
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    shutil.rmtree(folder)
    return Timing(held_s, total_s, sum(stat.st_blocks * 512 for stat in found), total_s, total_s)


def at_once(
    save: Callable[[Path, State], float], state: State
) -> Callable[[Path], tuple[float, Callable[[], None]]]:
    return lambda folder: (save(folder, state), lambda: None)


class Beside:
    """The asynchronous saver of a training, which reuses its copy for every save."""

    def __init__(self, root: Path, state: State) -> None:
        # A saver writes into one run directory, which is then moved to the folder of the measurement.
        self._run_dir, self._state = root / "beside", state
        self._saver = Saver(
            self._run_dir, CheckpointConfig(keep=1), group=dist.group.WORLD, metrics=Metrics(), say=self._say
        )
        started = time.perf_counter()
        self._saver.prepare(state)
        self.prepare_s = time.perf_counter() - started

    def _say(self, message: str) -> None:
        if not message.startswith("saved"):
            raise SystemExit(message)

    def save(self, folder: Path) -> tuple[float, Callable[[], None]]:
        folder.rmdir()
        started = time.perf_counter()
        self._saver.save(lambda: self._state, HEADER)
        return time.perf_counter() - started, lambda: self._wait(folder)

    def _wait(self, folder: Path) -> None:
        self._saver.wait()
        self._run_dir.rename(folder)


def median(timings: list[Timing]) -> Timing:
    return Timing(
        statistics.median(t.held_s for t in timings),
        statistics.median(t.total_s for t in timings),
        timings[0].disk_bytes,
        min(t.total_s for t in timings),
        max(t.total_s for t in timings),
    )


def compare(options: argparse.Namespace, root: Path) -> dict[str, object]:
    state = make_state(options.classes, options.dim, options.depth)
    state_bytes = sum(tensor.nbytes for tensors in local(state).values() for tensor in tensors.values())
    beside = Beside(root, state)
    sides = {
        "raw": at_once(save_raw, state),
        "raw, brisk": at_once(partial(save_raw, write_through=True), state),
        "insightface": at_once(save_as_insightface, state),
        "synchronous": at_once(save_synchronously, state),
        "beside": beside.save,
    }
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, save in sides.items():
            timings[name].append(measure(Path(tempfile.mkdtemp(dir=root)), save))
    found = {name: median(times) for name, times in timings.items()}
    ours = found["beside"]
    return {
        "classes": options.classes,
        "dim": options.dim,
        "depth": options.depth,
        "rounds": options.rounds,
        "state_bytes": state_bytes,
        "prepare_s": beside.prepare_s,
        "sides": {name: asdict(timing) for name, timing in found.items()},
        "held_to_synchronous": ours.held_s / found["synchronous"].total_s,
        "held_to_insightface": ours.held_s / found["insightface"].total_s,
        "total_to_raw": ours.total_s / found["raw"].total_s,
        "total_to_raw_brisk": ours.total_s / found["raw, brisk"].total_s,
        "goodput": [
            outlook(hours, ours, found["synchronous"], options.restart_s) for hours in FAILURES_EVERY_H
        ],
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
    }


def outlook(hours: float, beside: Timing, synchronous: Timing, restart_s: float) -> dict[str, float]:
    """Return the best intervals and expected shares of useful time for a mean time between failures."""
    found = {"mean_time_between_failures_h": float(hours), "restart_s": restart_s}
    # A failure also loses a checkpoint that is still being written.
    for name, held_s, lost_s in (
        ("beside", beside.held_s, restart_s + beside.total_s),
        ("synchronous", synchronous.held_s, restart_s),
    ):
        interval_s = best_interval(hold_s=held_s, mean_time_between_failures_s=hours * HOUR_S)
        found[f"{name}_interval_s"] = interval_s
        found[f"{name}_goodput"] = goodput(
            interval_s, hold_s=held_s, restart_s=lost_s, mean_time_between_failures_s=hours * HOUR_S
        )
    return found


def show(report: dict) -> None:
    gib = report["state_bytes"] / 2**30
    print(
        f"{report['classes']} classes x {report['dim']}, iresnet{report['depth']}: {gib:.2f} GiB of state\n"
    )
    print("| variant | delay | total | from, to | GiB/s | on disk |\n" + "| --- " * 6 + "|")
    for name, t in report["sides"].items():
        print(
            f"| {name} | {t['held_s']:.3f} s | {t['total_s']:.2f} s | {t['least_s']:.2f}, "
            f"{t['largest_s']:.2f} s | {gib / t['total_s']:.2f} | {t['disk_bytes'] / 2**30:.3f} GiB |"
        )
    print(f"\nallocation of the copy's memory, once, before the first step: {report['prepare_s']:.2f} s")
    print(f"delay / insightface's save: {report['held_to_insightface']:.3f} (target: under 0.1)")
    print(f"delay / our own synchronous save: {report['held_to_synchronous']:.3f}")
    print(f"total / raw write: {report['total_to_raw']:.2f} (target: 1.2)")
    print(f"total / brisk raw write: {report['total_to_raw_brisk']:.2f}\n")
    print(
        "| a failure every | beside: best interval | useful time | synchronous: best interval | useful time |"
    )
    print("| --- | --- | --- | --- | --- |")
    for row in report["goodput"]:
        print(
            f"| {row['mean_time_between_failures_h']:g} h | {row['beside_interval_s']:.0f} s "
            f"| {row['beside_goodput']:.2%} | {row['synchronous_interval_s']:.0f} s "
            f"| {row['synchronous_goodput']:.2%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of saving a checkpoint, compared with other ways.")
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, choices=[18, 34, 50, 100, 200], default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        help="folder on the disk to write to; default: the current folder",
    )
    parser.add_argument(
        "--restart-s", type=float, default=300.0, help="seconds from a failure to the next training step"
    )
    parser.add_argument("--json", type=Path, help="file to write all numbers to as well")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        report = compare(options, Path(root))
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
