"""Benchmark of the data pipeline: images per second, compared with DALI alone and a PyTorch DataLoader.

    python benchmarks/data.py --json benchmarks/results/data_cpu.json
    python benchmarks/data.py --device cuda --json benchmarks/results/data_h200.json

The dataset is an InsightFace folder given by --data, or 20,000 synthetic faces (112x112 JPEG, quality 95),
which `lgaf data synth` generates once in --work. The variants return float32 [batch, 3, 112, 112] in [-1, 1]:
- ours: the Loader as in training (catalog, shuffled order, reading and decoding), without augmentation;
- ours x10: the same on a union of ten copies of the dataset, so on ten times as many records;
- augmented: ours with flips and AdaFace's three augmentations with probability 0.2 each;
- ceiling: DALI decoding and normalising the same images from lists in memory, and nothing else;
- dataloader: a reimplementation of InsightFace's `MXFaceDataset`: a torch Dataset that seeks to a record of
  train.rec by its index, decodes with Pillow, flips, makes a tensor and normalises, with worker processes;
- trained: ours, read by forward and backward passes of an iresnet of `--depth` in bfloat16; `waiting` is
  the share of the time spent waiting for images. Not run by default on a CPU.

Every variant runs in a new process, and the variants take turns for `--rounds` rounds. A process reads
`--warm-up` batches and then times `--batches` of them. Figures are medians over the rounds. `first batch` is
the time from opening the (warm) catalog or the file to the first batch, without the imports. `memory` is the
growth of the process's anonymous memory (RssAnon) from after the imports to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from benchmarks.head import cpu_name, kib, output_of, synchronize
from data_pipeline.batch import RankSlice
from data_pipeline.common.pillow_decode import decoded
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.formats import recordio
from data_pipeline.indexed.catalog import open_catalog
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import LoaderContext
from data_pipeline.quarantine import Quarantine
from trainer import backbones

IDENTITIES, IMAGES_PER_IDENTITY = 2000, 10
SIDES = ["ours", "ours x10", "augmented", "ceiling", "dataloader", "trained"]
ADAFACE = {name: {"probability": 0.2} for name in ("crop", "low_resolution", "photometric")}
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """The measurement of one process."""

    side: str
    data: str
    batch: int
    threads: int
    device: str
    warm_up: int
    batches: int
    depth: int


# ---- in the process of one variant


def measure(case: Case) -> dict[str, float]:
    torch.set_num_threads(1)
    before = anonymous_bytes()
    began = time.perf_counter()
    batches = SOURCES[case.side](case)
    consume = training(case) if case.side == "trained" else lambda images_BCHW: None
    images_BCHW = next(batches)
    first_s = time.perf_counter() - began
    assert images_BCHW.shape == (case.batch, 3, 112, 112)
    assert images_BCHW.dtype == torch.float32
    for _ in range(case.warm_up):
        consume(next(batches))
    synchronize(case.device)
    began, waited_s = time.perf_counter(), 0.0
    for _ in range(case.batches):
        asked = time.perf_counter()
        images_BCHW = next(batches)
        waited_s += time.perf_counter() - asked
        consume(images_BCHW)
    synchronize(case.device)
    seconds = time.perf_counter() - began
    return {
        "images_per_s": case.batches * case.batch / seconds,
        "first_s": first_s,
        "wait": waited_s / seconds,
        "bytes": anonymous_bytes() - before,
    }


def training(case: Case) -> Callable[[torch.Tensor], None]:
    """Return a training step of a network; it waits for the GPU one step late, as training does."""
    config = backbones.parse({"name": "iresnet", "depth": case.depth})
    model = backbones.build(config, 112).to(case.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses: list[torch.Tensor] = []

    def step(images_BCHW: torch.Tensor) -> None:
        with torch.autocast(case.device, torch.bfloat16):
            losses.append(model(images_BCHW).emb_BD.square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) > 1:
            losses.pop(0).item()

    return step


def ours(case: Case, copies: int = 1, augment: dict[str, Any] | None = None) -> Iterator[torch.Tensor]:
    config = DataConfig(
        path=[Path(case.data)] * copies,
        threads=case.threads,
        augment=AugmentConfig.model_validate(augment or {"flip_probability": 0}),
    )
    rank_slice, device_id = RankSlice(0, 1, case.batch, case.batch), 0 if case.device == "cuda" else None
    context = LoaderContext(rank_slice, 1, 0, cursor=None, ranks_on_node=1, device_id=device_id)
    loader = Loader(config, open_catalog(config.path), context, Quarantine(None, 0.0))
    return (batch.images_BCHW for batch in loader)


@pipeline_def
def decoding(source: Callable[[], list[np.ndarray]], device: str) -> Any:
    encoded = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    return fn.crop_mirror_normalize(
        images, mean=[127.5] * 3, std=[127.5] * 3, dtype=types.FLOAT, output_layout="CHW"
    )


def ceiling(case: Case) -> Iterator[torch.Tensor]:
    catalog = open_catalog([Path(case.data)])
    rows = [np.array(catalog.image(i)) for i in range(min(len(catalog), 64 * case.batch))]
    turns = iter(range(1 << 30))

    def source() -> list[np.ndarray]:
        start = next(turns) * case.batch % (len(rows) - case.batch + 1)
        return rows[start : start + case.batch]

    on_gpu = case.device == "cuda"
    pipeline = decoding(
        source,
        "mixed" if on_gpu else "cpu",
        batch_size=case.batch,
        num_threads=case.threads,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=2,
    )
    while True:
        yield torch.from_dlpack(pipeline.run()[0].as_tensor())


class RecordDataset(torch.utils.data.Dataset):
    """Dataset that reads one record at a time by its key; each worker opens the file."""

    def __init__(self, folder: Path) -> None:
        self._path, self._file = folder / "train.rec", None
        key_N, offset_N = recordio.read_index(folder / "train.idx")
        ends = [*offset_N[1:].tolist(), self._path.stat().st_size]
        self._span_of = {
            key: (start, end - start)
            for key, start, end in zip(key_N.tolist(), offset_N.tolist(), ends, strict=True)
        }
        self._keys = [key for key in self._span_of if self._record(key).image]
        self._file = None
        self._dice = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self._record(self._keys[i])
        image = decoded(np.frombuffer(record.image, np.uint8), "").convert("RGB")
        if self._dice.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels_CHW = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()
        pixels_CHW = pixels_CHW.to(torch.float32).div(255).sub_(0.5).div_(0.5)
        return pixels_CHW, torch.tensor(int(record.labels[0]) if record.labels else 0)

    def _record(self, key: int) -> recordio.Record:
        if self._file is None:
            self._file = open(self._path, "rb")
        start, length = self._span_of[key]
        self._file.seek(start)
        return recordio.unpack(recordio.join_frames(self._file.read(length), "", start), "")


def dataloader(case: Case) -> Iterator[torch.Tensor]:
    dataset = RecordDataset(Path(case.data))
    while True:
        batches = torch.utils.data.DataLoader(
            dataset,
            case.batch,
            shuffle=True,
            drop_last=True,
            num_workers=case.threads,
            pin_memory=case.device == "cuda",
        )
        for images_BCHW, _ in batches:
            yield images_BCHW.to(case.device, non_blocking=True)


SOURCES: dict[str, Callable[[Case], Iterator[torch.Tensor]]] = {
    "ours": ours,
    "ours x10": lambda case: ours(case, copies=10),
    "augmented": lambda case: ours(case, augment=ADAFACE),
    "ceiling": ceiling,
    "dataloader": dataloader,
    "trained": ours,
}


def anonymous_bytes() -> int:
    return kib(Path("/proc/self/status"), "RssAnon")


# ---- in the process that the user started


def run(case: Case) -> dict[str, Any]:
    return output_of([sys.executable, __file__, "--worker", json.dumps(asdict(case))], os.environ)


def compare(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    seen: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, results in zip(cases, seen, strict=True):
            results.append(run(case))
            print(f"{case.side}, batch {case.batch}: {results[-1]}", file=sys.stderr, flush=True)
    return [summary(case, results) for case, results in zip(cases, seen, strict=True)]


def summary(case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"side": case.side, "batch": case.batch, "threads": case.threads}
    failed = [result for result in results if "failed" in result]
    if failed:
        return {**about, **failed[0]}
    medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
    return {**about, **medians, "all_images_per_s": [result["images_per_s"] for result in results]}


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| batch | side | images/s (slowest to fastest) | of the ceiling | times the DataLoader "
        "| waiting | first batch, s | memory, MiB |",
        "| " + "--- | " * 8,
    ]
    speed = {(r["batch"], r["side"]): r["images_per_s"] for r in found if "failed" not in r}
    for result in found:
        start = f"| {result['batch']} | {result['side']} |"
        if "failed" in result:
            lines.append(f"{start} {result['failed'][:80]} | | | | | |")
            continue
        rates = result["all_images_per_s"]
        ratios = [
            f"{result['images_per_s'] / speed[result['batch'], side]:.2f}"
            if (result["batch"], side) in speed
            else ""
            for side in ("ceiling", "dataloader")
        ]
        lines.append(
            f"{start} {result['images_per_s']:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {ratios[0]} "
            f"| {ratios[1]} | {result['wait']:.1%} | {result['first_s']:.2f} | {result['bytes'] / MIB:.0f} |"
        )
    return "\n".join(line.strip() for line in lines)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
        "dali": __import__("nvidia.dali").dali.__version__,
        "load_average_at_start": os.getloadavg()[0],
    }


def synthetic_set(work: Path) -> Path:
    """Return the folder of the synthetic dataset, which is generated on first use."""
    folder = work / f"faces_{IDENTITIES}x{IMAGES_PER_IDENTITY}"
    if not (folder / "held_out.bin").exists():
        settings = (
            f"identities={IDENTITIES}",
            f"images_per_identity={IMAGES_PER_IDENTITY}",
            "jpeg_quality=95",
        )
        words = [word for setting in settings for word in ("--set", setting)]
        subprocess.run([sys.executable, "-m", "trainer", "data", "synth", str(folder), *words], check=True)
    return folder


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training batches per second from one dataset.")
    parser.add_argument("--data", type=Path, help="InsightFace folder of 112x112 images; default: synthetic")
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder for the synthetic dataset")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: all; on a CPU all but trained")
    parser.add_argument("--batch", nargs="+", type=int, default=[128])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="decode threads or workers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=5, help="processes per variant; the variants take turns"
    )
    parser.add_argument("--warm-up", type=int, default=20, help="batches before the timed ones")
    parser.add_argument("--batches", type=int, default=150, help="timed batches of a process")
    parser.add_argument("--depth", type=int, default=100, help="layers of the network of `trained`")
    parser.add_argument(
        "--json", type=Path, help="file for all numbers; the table is written beside it as .md"
    )
    options = parser.parse_args(arguments)
    options.sides = options.sides or (SIDES if options.device == "cuda" else SIDES[:-1])
    return options


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--worker"]:
        print(json.dumps(measure(Case(**json.loads(arguments[1])))))
        sys.stdout.flush()
        os._exit(0)  # worker processes and decoding threads may be in the middle of a batch
    options = parse(arguments)
    data = options.data or synthetic_set(options.work)
    about, found = machine(options), []
    for batch in options.batch:
        cases = [
            Case(
                side,
                str(data),
                batch,
                options.threads,
                options.device,
                options.warm_up,
                options.batches,
                options.depth,
            )
            for side in options.sides
        ]
        found += compare(cases, options.rounds)
    about["load_average_at_end"] = os.getloadavg()[0]
    report = "\n".join(f"{key}: {value}  " for key, value in about.items()) + "\n\n" + table(found)
    print(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": about, "results": found}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(report + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
