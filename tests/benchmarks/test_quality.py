"""The benchmark of networks on bad faces as a user starts it, on few people and steps; its parts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality import CONDITIONS, KINDS, TAKES, Seen, accuracy, by_kind, moved

ROOT = Path(__file__).parents[2]


def test_networks_are_trained_and_compared(tmp_path):
    file, page = tmp_path / "found.json", tmp_path / "page.html"
    size = ["--people", "4", "--test-people", "3", "--seeds", "1", "2", "--networks", "twin"]
    small = ["steps=2", "global_batch=8", "data.image_size=48", "backbone.embedding_size=16"]
    words = [*size, *(word for one in small for word in ("--set", one)), "--json", file, "--page", page]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "quality.py", "--folder", tmp_path / "runs", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["operations"]["twin"] >= report["operations"]["lgaf"] > 0
    for key in ("accuracy_RS", "tar_at_far_0.01_RS"):
        for name in ("lgaf", "twin"):
            figures = np.array(report[key][name])
            assert figures.shape == (2, len(CONDITIONS))
            assert not np.array_equal(figures[0], figures[1])
    assert "ahead of its twin on degraded faces" in done.stdout
    for kind in KINDS:
        assert kind in page.read_text()


def test_accuracy_by_hand():
    """Two people whose pictures are right under every condition but one, where they are each other's."""
    person_N = np.repeat([0, 1], TAKES)
    emb_NSD = np.eye(2)[np.tile(person_N[:, None], (1, 1 + len(CONDITIONS)))]
    emb_NSD[:, 5] = emb_NSD[::-1, 5]
    figures = accuracy(Seen(emb_NSD, np.ones((2 * TAKES, 1, 1)), np.ones((2 * TAKES, 1, 1))))
    assert figures[4].tolist() == [0, 0]
    assert np.delete(figures, 4, axis=0).min() == 1
    kinds = by_kind(figures[:, 0])
    assert kinds["occlusion"] == 0.75
    assert kinds["none"] == 1
    assert np.isclose(kinds["degraded"], 1 - 0.25 / len(KINDS))


def test_motion_spreads_a_point_along_its_way():
    picture = Image.new("RGB", (112, 112))
    picture.putpixel((56, 56), (250, 250, 250))
    spread_HW = np.asarray(moved(picture, 8, 0.0))[:, :, 0]
    assert np.flatnonzero(spread_HW.any(1)).tolist() == [56]
    assert np.flatnonzero(spread_HW.any(0)).tolist() == list(range(52, 61))
