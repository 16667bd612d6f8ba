"""A small synthetic dataset, and functions that train on it through the command line, in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.synthetic.dataset import write_set
from data_pipeline.synthetic.identities import SynthConfig

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo.toml"
SMALL = SynthConfig(identities=20, images_per_identity=8, held_out_identities=8, pairs=60, difficulty=0.3)
TINY_NETWORK = ("backbone.width=8", "backbone.embedding_size=32", "data.image_size=48", "global_batch=32")


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """160 images of 20 identities, and 60 pairs of others."""
    folder = tmp_path_factory.mktemp("faces") / "set"
    write_set(folder, SMALL)
    return folder


def command(*words: object, ranks: int = 1) -> list[str]:
    """`lgaf WORDS`, alone or under torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return [sys.executable, *launcher, "-m", "trainer", *map(str, words)]


def train_words(run_dir: Path, data: Path, *overrides: str) -> list[str]:
    """The words of a tiny training in `run_dir`."""
    given = (f"run_dir={run_dir}", f"data.path={data}", "metrics.port=0", *TINY_NETWORK, *overrides)
    return ["train", str(CONFIG), *(word for value in given for word in ("--set", value))]


def environment() -> dict[str, str]:
    """One thread per process: the order of a floating-point sum depends on their number."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*words: object, ranks: int = 1, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. A rank that hangs fails the test by the timeout."""
    return subprocess.run(
        command(*words, ranks=ranks), env=environment(), text=True, capture_output=True, timeout=timeout_s
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss of every step that the run recorded."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
