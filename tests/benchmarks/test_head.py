"""The command of the head's benchmark, with a small head."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import head

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


def benchmark(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "head.py"), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_sides_train_the_same_and_the_dense_one_needs_more_memory(tmp_path):
    file = tmp_path / "head.json"
    size = ["--classes", 20_000, "--batch", 64, "--dim", 16, "--rate", 1, "--rounds", 1, "--repeats", 1]
    sides = ["--sides", "streaming", "dense", "streaming,tile=-1"]
    done = benchmark(*size, *sides, "--threads", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    streaming, dense, refused = report["results"]
    assert "tile" in refused["failed"]
    assert streaming["losses"] == pytest.approx(dense["losses"], rel=1e-3)
    assert streaming["held_bytes"] == dense["held_bytes"] == 20_000 * 16 * 8
    # The dense variant holds several tensors of logits [64, 20,000]; allocators may keep 4 MiB.
    assert dense["extra_bytes"] > 2 * 64 * 20_000 * 4
    assert streaming["extra_bytes"] < dense["extra_bytes"] - (4 << 20)
    assert report["machine"]["probe"]["matmul_flops"] > 0
    assert file.with_suffix(".md").read_text() == done.stdout


def test_insightface_needs_its_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit):
        head.parse(["--insightface", str(tmp_path)])
    assert "expected partial_fc_v2.py" in capsys.readouterr().err
