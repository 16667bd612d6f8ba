"""Benchmark of one training step of the class head: time and peak extra memory, compared with InsightFace's.

    python benchmarks/head.py --insightface DIR --json benchmarks/results/head_cpu.json --threads 2
The same on one GPU of 140 GB (up to 29 million identities, full softmax, batch 4096):
    python benchmarks/head.py --device cuda --insightface DIR --json benchmarks/results/head_h200.json \
        --classes 500000 1000000 2000000 3000000 10000000 29000000 --batch 4096 --rate 1 \
        --sides streaming streaming,matrix_inputs=bf16 kernels kernels,optimizer.moments=bf16 insightface
DIR is a checkout of deepinsight/insightface or its recognition/arcface_torch.

`--sides` lists the variants: a backend of HeadConfig, with further keys of it after commas, or `insightface`,
its PartialFC_V2 and CombinedMarginLoss with torch's SGD, called as its train_v2.py calls them. All variants
get the same weights, embeddings, labels, margin (its ArcFace, whose derivative is 1), learning rate, momentum
and decay, and a process group of one rank. At rate 1 they must therefore compute the same loss; a variant
that does not is reported as failed. InsightFace multiplies in float32 on a CPU and in float16 on a GPU;
`matrix_inputs` sets it for ours. A step is forward, backward to the embeddings, and the update of the rows.
On a CPU InsightFace's `.cuda()` calls are replaced by functions that return their tensor.

Every variant runs in a new process, and the variants take turns for `--rounds` rounds. A process runs one
step to warm up and then `--repeats` timed ones. Times are medians over all rounds. Extra memory is the peak
over all steps of a process, minus rows, moments and batch, and the largest of the rounds is reported. On a
GPU the peak is the allocator's. On a CPU it is the process's peak resident memory (VmHWM), which includes the
memory of matrix libraries and of the allocator; its baseline is read after a step of a few classes has loaded
the libraries. A process may use 90 % of the memory that is free at its start. A variant that exceeds this is
reported as not fitting.

Unless the environment overrides it, OpenMP's threads are bound to cores and spin while they wait. Sleeping
threads wake too late for tiles that take under a millisecond (measured on two free cores, 100k classes,
streaming: 0.8 s spinning, 1.4 s sleeping; no difference for InsightFace's large operations). On cores that
other programs use too, spinning makes ours slower.

First the machine is measured: the rate of a square product (float32; bfloat16 on a GPU) and of a large copy.
docs/scaling.md compares the measured steps with these rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from partial_fc import collectives
from partial_fc.config import HeadConfig
from partial_fc.head import PartialFC

SCALE, MARGIN, MOMENTUM, DECAY, LEARNING_RATE = 64.0, 0.5, 0.9, 5e-4, 0.1
WARM_UP = 1
SEED = 1
MIB = 1 << 20
OURS = ["streaming", "streaming,matrix_inputs=bf16", "dense", "kernels"]
LOSS_TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 0.05  # relative; the second for factors of 16 or 19 bits
PROBE_REPEATS = 100
FREE_SHARE = 0.9
OPENMP = {"OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true"}

Step = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """The measurement of one process."""

    side: str
    classes: int
    batch: int
    rate: float
    dim: int
    device: str
    threads: int
    repeats: int
    matmul_precision: str
    insightface: str | None


# ---- in the process of one variant


def measure(case: Case) -> dict[str, Any]:
    """Return times, losses and memory of one variant."""
    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision(case.matmul_precision)
    dist.init_process_group(
        "nccl" if case.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    tiny = replace(case, classes=64, batch=8)
    build(tiny, *batch_of(tiny))[0](0)
    inputs = batch_of(case)
    limit_memory(case.device)
    start = resident(case.device)
    step, held = build(case, *inputs)
    losses = [step(number) for number in range(WARM_UP)]
    times = []
    for number in range(WARM_UP, WARM_UP + case.repeats):
        began = time.perf_counter()
        losses.append(step(number))  # a float, so the device has finished
        times.append(time.perf_counter() - began)
    extra = peak(case.device) - start - held
    dist.destroy_process_group()
    return {"times_s": times, "losses": losses, "extra_bytes": extra, "held_bytes": held}


def batch_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and labels, the same for all variants."""
    dice = torch.Generator().manual_seed(SEED)
    emb_GD = torch.randn(case.batch, case.dim, generator=dice)
    label_G = torch.randint(case.classes, (case.batch,), generator=dice)
    return emb_GD.to(case.device), label_G.to(case.device)


def fill(weight_CD: torch.Tensor, emb_GD: torch.Tensor, label_G: torch.Tensor) -> None:
    """Fill the class rows, the same for all variants; rows of the batch have a cosine of about 0.7.

    InsightFace clamps probabilities, so that its loss cannot exceed 69.08: with random rows all losses would
    be equal.
    """
    dice = torch.Generator(weight_CD.device).manual_seed(SEED + 1)
    with torch.no_grad():
        weight_CD.normal_(0, 0.01, generator=dice).index_add_(0, label_G, emb_GD, alpha=0.01)


def build(case: Case, emb_GD: torch.Tensor, label_G: torch.Tensor) -> tuple[Step, int]:
    """Return the step of a variant, and the bytes of its rows and moments."""
    if case.side == "insightface":
        return build_insightface(case, emb_GD, label_G)
    return build_ours(case, emb_GD, label_G)


def build_ours(case: Case, emb_GD: torch.Tensor, label_G: torch.Tensor) -> tuple[Step, int]:
    group = dist.group.WORLD
    head = PartialFC(
        head_config(case),
        num_classes=case.classes,
        embedding_size=case.dim,
        seed=SEED,
        group=group,
        device=case.device,
    )
    fill(head.weight_RD, emb_GD, label_G)
    no_norms = emb_GD.new_empty(len(emb_GD), 0)

    def step(number: int) -> float:
        head.begin_step(number, label_G)
        gathered = collectives.gather(emb_GD, label_G, no_norms, group)
        loss, grad_GD = head.forward_backward(gathered.emb_GD, gathered.label_G)
        collectives.scatter(grad_GD, group)
        head.step(LEARNING_RATE)
        synchronize(case.device)
        return float(loss)

    state = head.logical_state().values()
    return step, sum(tensor.nbytes for tensor in state)


def head_config(case: Case) -> HeadConfig:
    backend, *settings = case.side.split(",")
    optimizer: dict[str, Any] = {"momentum": MOMENTUM, "weight_decay": DECAY}
    head: dict[str, Any] = {
        "backend": backend,
        "margin": {"kind": "arcface-straight-through", "m": MARGIN},
        "scale": SCALE,
        "sample_rate": case.rate,
        "optimizer": optimizer,
    }
    for setting in settings:
        key, value = setting.split("=", 1)
        (optimizer if key.startswith("optimizer.") else head)[key.removeprefix("optimizer.")] = value
    return HeadConfig.model_validate(head)


def build_insightface(case: Case, emb_GD: torch.Tensor, label_G: torch.Tensor) -> tuple[Step, int]:
    assert case.insightface is not None
    sys.path.insert(0, case.insightface)
    from losses import CombinedMarginLoss  # type: ignore[import-not-found]
    from partial_fc_v2 import PartialFC_V2  # type: ignore[import-not-found]

    if case.device == "cpu":
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    margin = CombinedMarginLoss(SCALE, 1.0, MARGIN, 0.0)
    head = PartialFC_V2(margin, case.dim, case.classes, case.rate, False).train().to(case.device)
    fill(head.weight, emb_GD, label_G)
    optimizer = torch.optim.SGD(head.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=DECAY)

    def step(number: int) -> float:
        features_GD = emb_GD.clone().requires_grad_()
        loss = head(features_GD, label_G)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(case.device)
        return float(loss)

    return step, 2 * head.weight.nbytes


def probe(case: Case) -> dict[str, float]:
    """Return FLOP/s of a square product, and bytes/s (read and written) of a large copy; the best of many."""
    torch.set_num_threads(case.threads)
    on_gpu = case.device == "cuda"
    size, dtype = (
        (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    )  # the CPU's matrices fit its cache
    left, right = torch.randn(2, size, size, device=case.device).to(dtype)
    source = torch.ones(32 * MIB, device=case.device)
    target = torch.empty_like(source)
    return {
        "matmul_flops": 2 * size**3 / fastest(lambda: left @ right, case.device),
        "copy_bytes_per_s": 2 * source.nbytes / fastest(lambda: target.copy_(source), case.device),
    }


def fastest(action: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(PROBE_REPEATS):
        began = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def limit_memory(device: str) -> None:
    """Make allocations fail that exceed the free memory; a GPU's allocator does so without a limit."""
    if device == "cpu":
        free = kib(Path("/proc/meminfo"), "MemAvailable")
        used = kib(Path("/proc/self/status"), "VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(free * FREE_SHARE), resource.RLIM_INFINITY))


def resident(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return kib(Path("/proc/self/status"), "VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else kib(Path("/proc/self/status"), "VmHWM")


def kib(path: Path, key: str) -> int:
    """Return the value of the line `key: N kB` of a file, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} has no {key}"
    return int(found[1]) << 10


def work(task: str, case: Case) -> dict[str, Any]:
    try:
        return measure(case) if task == "measure" else dict(probe(case))
    except Exception as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        return {"failed": "does not fit" if is_memory else f"{type(error).__name__}: {error}"}


# ---- in the process that the user started


def run(task: str, case: Case) -> dict[str, Any]:
    """Return the result of `work` in a new process."""
    command = [sys.executable, __file__, "--worker", task, json.dumps(asdict(case))]
    return output_of(command, {**OPENMP, **os.environ})


def output_of(command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a command and return the JSON in its last line; its last error line under "failed" if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        ending = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"process ended with {done.returncode}: {ending[0]}"}
    return json.loads(done.stdout.splitlines()[-1])


def compare(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Return one result per case (the variants of one size); their processes take turns."""
    seen: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, results in zip(cases, seen, strict=True):
            if not any("failed" in result for result in results):
                results.append(run("measure", case))
                note(f"{case.side}, {case.classes} classes, batch {case.batch}, rate {case.rate:g}")
    found = [summary(case, results) for case, results in zip(cases, seen, strict=True)]
    if cases[0].rate == 1:
        check_losses(found)
    return found


def summary(case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
    size = {key: value for key, value in asdict(case).items() if key != "insightface"}
    if "failed" in results[-1]:
        return {**size, "failed": results[-1]["failed"]}
    times = [second for result in results for second in result["times_s"]]
    return {
        **size,
        "step_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "extra_bytes": max(result["extra_bytes"] for result in results),
        "held_bytes": results[0]["held_bytes"],
        "losses": results[0]["losses"],
    }


def check_losses(found: list[dict[str, Any]]) -> None:
    """Mark variants as failed whose first loss differs from that of the first variant.

    Without sampling, all variants compute the same first loss. Later losses differ with the precision.
    """
    ran = [result for result in found if "failed" not in result]
    for result in ran[1:]:
        loss, expected = result["losses"][0], ran[0]["losses"][0]
        is_rounded = result["device"] == "cuda" or "matrix_inputs" in result["side"]
        tolerance = ROUNDED_TOLERANCE if is_rounded else LOSS_TOLERANCE
        if abs(loss - expected) > tolerance * abs(expected):
            result["failed"] = f"loss {loss:.6g}, but {ran[0]['side']} found {expected:.6g}"


def table(found: list[dict[str, Any]]) -> str:
    """Return a Markdown table; speed and memory are relative to InsightFace, or else to the dense variant."""
    lines = [
        "| classes | batch | rate | side | step, ms (fastest to slowest) | ns per class | extra memory, MiB "
        "| of rows and moments | speed | memory |",
        "| " + "--- | " * 10,
    ]
    references = {
        size_of(result): result
        for side in ("dense", "insightface")
        for result in found
        if result["side"] == side and "failed" not in result
    }
    for result in found:
        lines.append(row(result, references.get(size_of(result))))
    return "\n".join(line.strip() for line in lines)


def size_of(result: dict[str, Any]) -> tuple[int, int, float]:
    return result["classes"], result["batch"], result["rate"]


def row(result: dict[str, Any], reference: dict[str, Any] | None) -> str:
    start = f"| {result['classes']} | {result['batch']} | {result['rate']:g} | {result['side']} |"
    if "failed" in result:
        return f"{start} {result['failed'][:80]} | | | | | |"
    ratios = "| |"
    if reference is not None:
        speed = reference["step_s"] / result["step_s"]
        memory = reference["extra_bytes"] / max(result["extra_bytes"], 1)
        ratios = f"{speed:.2f} x | 1 / {memory:.1f} |"
    spread = f"{result['fastest_s'] * 1e3:.0f} to {result['slowest_s'] * 1e3:.0f}"
    return (
        f"{start} {result['step_s'] * 1e3:.0f} ({spread}) | {result['step_s'] * 1e9 / result['classes']:.0f} "
        f"| {result['extra_bytes'] / MIB:.1f} | {result['extra_bytes'] / result['held_bytes']:.1%} | {ratios}"
    )


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return device, versions and load of the machine."""
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matmul_precision": options.matmul_precision,
        "openmp": {key: os.environ.get(key, value) for key, value in OPENMP.items()},
        "insightface_partial_fc_v2_sha256": digest(options.insightface),
        "load_average_at_start": os.getloadavg()[0],
    }


def cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def digest(folder: Path | None) -> str | None:
    return None if folder is None else hashlib.sha256((folder / "partial_fc_v2.py").read_bytes()).hexdigest()


def insightface_folder(text: str) -> Path:
    for folder in (Path(text), Path(text) / "recognition" / "arcface_torch"):
        if (folder / "partial_fc_v2.py").exists():
            return folder.resolve()
    raise argparse.ArgumentTypeError(
        f"expected partial_fc_v2.py in {text} or its recognition/arcface_torch; "
        "give a checkout of deepinsight/insightface"
    )


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of one step of the class head.")
    parser.add_argument("--sides", nargs="+", help="variants, see the head of this file; default: all")
    parser.add_argument("--insightface", type=insightface_folder, help="checkout of deepinsight/insightface")
    parser.add_argument("--classes", nargs="+", type=int, default=[100_000, 500_000, 1_000_000, 2_000_000])
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--rate", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes per variant; the variants take turns"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--matmul-precision", choices=["highest", "high"], default="highest")
    parser.add_argument(
        "--json", type=Path, help="file for all numbers; the table is written beside it as .md"
    )
    options = parser.parse_args(arguments)
    options.sides = options.sides or OURS + ["insightface"] * (options.insightface is not None)
    if "insightface" in options.sides and options.insightface is None:
        parser.error("the side insightface needs --insightface DIR")
    return options


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--worker"]:
        print(json.dumps(work(arguments[1], Case(**json.loads(arguments[2])))))
        return
    options = parse(arguments)
    about = machine(options)
    found: list[dict[str, Any]] = []
    for classes, batch, rate in product(options.classes, options.batch, options.rate):
        case = Case(
            side="",
            classes=classes,
            batch=batch,
            rate=rate,
            dim=options.dim,
            device=options.device,
            threads=options.threads,
            repeats=options.repeats,
            matmul_precision=options.matmul_precision,
            insightface=options.insightface and str(options.insightface),
        )
        if not found:
            about["probe"] = run("probe", case)
        found += compare([replace(case, side=side) for side in options.sides], options.rounds)
        about["load_average_at_end"] = os.getloadavg()[0]
        if options.json:  # after every size, because the next one may take long
            write(options.json, about, found)
    print(report(about, found))


def report(about: dict[str, Any], found: list[dict[str, Any]]) -> str:
    return "\n".join(f"{key}: {value}  " for key, value in about.items()) + "\n\n" + table(found)


def write(path: Path, about: dict[str, Any], found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, "results": found}, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(about, found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
