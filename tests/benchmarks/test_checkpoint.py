"""The command of the checkpoint benchmark, with a small state."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_all_sides_write_the_state(tmp_path):
    file = tmp_path / "found.json"
    size = ["--classes", "2000", "--dim", "64", "--depth", "18", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "checkpoint.py", *size, "--folder", tmp_path, "--json", file],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert list(report["sides"]) == ["raw", "raw, brisk", "insightface", "synchronous", "beside"]
    for name, timing in report["sides"].items():
        assert report["state_bytes"] <= timing["disk_bytes"] < 1.02 * report["state_bytes"], name
        assert timing["held_s"] <= timing["total_s"]
    assert "total / raw write" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
