"""Cost model of a step of the sharded head: formulas, counts, measurements and predictions.

    python benchmarks/scaling.py --measured benchmarks/results/head_cpu.json
    python benchmarks/scaling.py --gpu h200 --batch-per-gpu 128 --gpus 8 64 1024 --classes 2000000 100000000

Symbols: G rows of the global (micro-)batch, C classes, D embedding size, W ranks, r sample rate; R classes
and S sampled classes of one rank. `docs/scaling.md` explains the formulas. Three tables are printed:
1. the bytes that gloo ranks pass to their collectives, counted, and the formulas;
2. the times measured by `benchmarks/head.py`, and the formulas with the rates of the same machine;
3. predictions for GPUs that have not been measured, from figures of the data sheet and from an assumed
   efficiency and latency. All of these are options.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partial_fc import collectives
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC

NORMS = 2  # further numbers per row that LGAF's gather carries: the norms of its two branches
FLOAT, LABEL, DOUBLE = 4, 8, 8
NODE = 8  # GPUs joined by NVLink
# Sizes of the counted steps. With the smaller number of classes, some of 8 ranks have no class.
ROWS_OF_RANK, DIM, CLASSES = 6, 16, (7, 4000)
NAMES = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::allreduce_": "all_reduce",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}


@dataclass(frozen=True)
class Gpu:
    """Figures of NVIDIA's data sheets of the SXM cards: dense bf16 FLOP/s, bytes/s of memory, bytes."""

    matrix_flops: float
    memory_bytes_per_s: float
    memory_bytes: float


GPUS = {"h100": Gpu(989e12, 3.35e12, 80e9), "h200": Gpu(989e12, 4.8e12, 141e9)}


# ---- the cost model


def sampled(C: int, W: int, r: float, G: int) -> float:
    """Return S, the sampled classes of a rank: the drawn ones and the batch's others, if all differ."""
    R = math.ceil(C / W)
    return min(R, r * R + (1 - r) * G / W)


def flop(G: int, S: float, D: int) -> float:
    """Return the FLOP of a rank: the logits twice, and a product for each gradient, 2 G S D each."""
    return 8 * G * S * D


def held_bytes(R: float, D: int, moment_bytes: int = FLOAT) -> float:
    """Return the bytes of a rank's rows and momentum."""
    return R * D * (FLOAT + moment_bytes)


def moved_bytes(S: float, D: int, moment_bytes: int = FLOAT) -> float:
    """Return a rank's memory traffic if tiles stay in cache: rows 2 reads, 1 write; momentum 1 each."""
    return S * D * (3 * FLOAT + 2 * moment_bytes)


def logit_bytes(G: int, S: float) -> float:
    """Return the additional traffic if a tile's logits do not stay in cache (streaming on a GPU, not fused).

    Pass 1: product, exponential (2), sum, product. Pass 2: product, difference (2), exponential (2), product.
    """
    return (5 + 6) * FLOAT * G * S


def payloads(G: int, D: int, norms: int = NORMS) -> dict[str, int]:
    """Return the bytes of each collective's full tensor per (micro-)batch; they do not depend on C and r."""
    return {
        "all_gather": G * (FLOAT * D + LABEL + FLOAT * norms),
        "all_reduce": 2 * DOUBLE * G,
        "reduce_scatter": FLOAT * G * D,
    }


def sent_bytes(payload: dict[str, int], W: int) -> float:
    """Return the bytes that a rank sends in ring algorithms, the minimum; an all-reduce takes two rounds."""
    return (payload["all_gather"] + payload["reduce_scatter"] + 2 * payload["all_reduce"]) * (W - 1) / W


# ---- counted on real ranks


class Watch(TorchDispatchMode):
    """Recorder of the name and bytes of every collective, below the functions of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.append((NAMES.get(func.name(), func.name()), max(one.nbytes for one in tensors)))
        return func(*args, **(kwargs or {}))


def count(world_size: int) -> list[list[tuple[str, int]]]:
    """Return (collective, bytes of its full tensor) of a step of rank 0, in order, for each of CLASSES."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, folder), nprocs=world_size)
        steps = json.loads((Path(folder) / "steps.json").read_text())
    return [[(name, size) for name, size in step] for step in steps]


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    steps = [_watched_step(rank, classes) for classes in CLASSES]
    if rank == 0:
        (Path(folder) / "steps.json").write_text(json.dumps(steps))
    dist.barrier()
    dist.destroy_process_group()


def _watched_step(rank: int, classes: int) -> list[tuple[str, int]]:
    group = dist.group.WORLD
    config = HeadConfig(sample_rate=0.5)
    head = PartialFC(config, num_classes=classes, embedding_size=DIM, seed=1, group=group, device="cpu")
    torch.manual_seed(rank)
    emb_BD, norm_BK = torch.randn(ROWS_OF_RANK, DIM), torch.ones(ROWS_OF_RANK, NORMS)
    label_B = torch.full((ROWS_OF_RANK,), 3)
    with Watch() as watch:
        head.begin_step(0, label_B)  # all ranks have these labels
        gathered = collectives.gather(emb_BD, label_B, norm_BK, group)
        _, grad_GD = head.forward_backward(gathered.emb_GD, gathered.label_G)
        collectives.scatter(grad_GD, group)
        head.step(0.1)
    return watch.seen


def counted_rows(worlds: list[int]) -> Iterator[list[str]]:
    for W in worlds:
        expected = payloads(W * ROWS_OF_RANK, DIM)
        for classes, step in zip(CLASSES, count(W), strict=True):
            verdict = (
                "equals the formula" if sorted(step) == sorted(expected.items()) else f"expected {expected}"
            )
            calls = ", ".join(f"{name} {size:,}" for name, size in step)
            yield [str(W), str(classes), calls, f"{sent_bytes(dict(step), W):,.0f}", verdict]


# ---- measured by head.py


def measured_rows(path: Path) -> Iterator[list[str]]:
    """Yield the fastest streamed steps of a file, and FLOP / matrix rate + bytes / copy rate."""
    report = json.loads(path.read_text())
    rates = report["machine"]["probe"]
    for result in report["results"]:
        if result["side"] != "streaming" or "failed" in result:
            continue
        G, D = result["batch"], result["dim"]
        S = sampled(result["classes"], 1, result["rate"], G)
        compute_s = flop(G, S, D) / rates["matmul_flops"]
        memory_s = moved_bytes(S, D) / rates["copy_bytes_per_s"]
        yield [
            f"{result['classes']:,}",
            str(G),
            f"{result['rate']:g}",
            milliseconds(compute_s),
            milliseconds(memory_s),
            milliseconds(compute_s + memory_s),
            milliseconds(result["fastest_s"]),
            f"{result['fastest_s'] / (compute_s + memory_s):.2f}",
        ]


# ---- predicted


@dataclass(frozen=True)
class Cluster:
    """A GPU, and the assumed efficiency, bandwidths and latency."""

    gpu: Gpu
    efficiency: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float

    def compute_s(self, G: int, S: float, D: int, moment_bytes: int) -> float:
        """Return the time with fused kernels, whose logits stay on the chip, without any overlap."""
        return (
            flop(G, S, D) / (self.efficiency * self.gpu.matrix_flops)
            + moved_bytes(S, D, moment_bytes) / self.gpu.memory_bytes_per_s
        )

    def logit_s(self, G: int, S: float) -> float:
        """Return the additional time without fused kernels."""
        return logit_bytes(G, S) / self.gpu.memory_bytes_per_s

    def send_s(self, G: int, D: int, W: int) -> float:
        """Return the time of a ring over its slowest link, plus the latency of three calls."""
        link = self.nvlink_bytes_per_s if W <= NODE else self.network_bytes_per_s
        return sent_bytes(payloads(G, D), W) / link + 3 * math.log2(W) * self.latency_s


def predicted_rows(cluster: Cluster, options: argparse.Namespace) -> Iterator[list[str]]:
    D, moment_bytes = options.dim, options.moment_bytes
    for C in options.classes:
        for W in options.gpus:
            G = options.global_batch or options.batch_per_gpu * W
            held = held_bytes(math.ceil(C / W), D, moment_bytes)
            fits = "" if held < cluster.gpu.memory_bytes else " (does not fit)"
            send_s = cluster.send_s(G, D, W)
            row = [f"{C:,}", str(W), f"{G:,}", f"{held / 1e9:.2f}{fits}", milliseconds(send_s)]
            for r in options.rate:
                S = sampled(C, W, r, G)
                fused_s = send_s + cluster.compute_s(G, S, D, moment_bytes)
                row += [milliseconds(fused_s), milliseconds(fused_s + cluster.logit_s(G, S))]
            yield row


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 1e-2 else 1 if seconds < 0.1 else 0}f}"


def print_table(title: str, columns: list[str], rows: Iterator[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Cost model of the sharded head: counted, measured, predicted."
    )
    parser.add_argument(
        "--ranks", nargs="*", type=int, default=[1, 2, 3, 4, 8], help="gloo ranks to count on"
    )
    parser.add_argument("--measured", type=Path, help="file that benchmarks/head.py --json has written")
    parser.add_argument(
        "--classes", nargs="+", type=int, default=[2_000_000, 10_000_000, 29_000_000, 100_000_000]
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 32, 128, 512, 1024])
    parser.add_argument("--rate", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--batch-per-gpu", type=int, default=128)
    parser.add_argument("--global-batch", type=int, help="instead: one global batch for any number of GPUs")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--moment-bytes", type=int, choices=[2, 4], default=FLOAT)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the matrix rate (assumed)")
    parser.add_argument("--nvlink", type=float, default=450e9, help="bytes/s of a GPU, one way (data sheet)")
    parser.add_argument("--network", type=float, default=50e9, help="bytes/s of a GPU, one way (400 Gbit/s)")
    parser.add_argument("--latency", type=float, default=10e-6, help="s of a call per log2(GPUs) (assumed)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.ranks:
        columns = ["ranks", "classes", "collectives of a step and their bytes", "sent by a rank", "verdict"]
        title = f"Counted: gloo ranks, {ROWS_OF_RANK} rows each, D = {DIM}, {NORMS} norms per row, r = 0.5"
        print_table(title, columns, counted_rows(options.ranks))
    if options.measured:
        columns = [
            "classes",
            "G",
            "r",
            "products, ms",
            "memory, ms",
            "model, ms",
            "measured, ms",
            "measured / model",
        ]
        print_table(f"Measured: streaming, {options.measured}", columns, measured_rows(options.measured))
    cluster = Cluster(GPUS[options.gpu], options.efficiency, options.nvlink, options.network, options.latency)
    columns = ["classes", "GPUs", "G", "rows and moments per GPU, GB", "sending, ms"]
    columns += [f"r = {r:g}, {way}, ms" for r in options.rate for way in ("fused", "not fused")]
    title = f"Predicted, not measured: {options.gpu}, D = {options.dim}, {cluster}"
    print_table(title, columns, predicted_rows(cluster, options))


if __name__ == "__main__":
    main()
