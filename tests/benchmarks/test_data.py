"""The command of the loader's benchmark, with a few synthetic faces."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.data import SIDES
from data_pipeline.synthetic.dataset import write_set
from data_pipeline.synthetic.identities import SynthConfig

ROOT = Path(__file__).parents[2]


def test_every_side_delivers(tmp_path):
    faces = SynthConfig(identities=16, images_per_identity=4, held_out_identities=2, pairs=2, difficulty=0)
    write_set(tmp_path / "faces", faces)
    options = ["--rounds", 2, "--warm-up", 1, "--batches", 3, "--batch", 8, "--threads", 1, "--depth", 18]
    file = tmp_path / "data.json"
    words = ["--data", tmp_path / "faces", "--json", file, "--sides", *SIDES, *options]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "data.py", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["results"]
    assert [result["side"] for result in found] == SIDES
    for result in found:
        assert "failed" not in result, result
        assert len(result["all_images_per_s"]) == 2
        assert result["images_per_s"] > 0
        assert 0 <= result["wait"] <= 1
    assert file.with_suffix(".md").read_text() == done.stdout
