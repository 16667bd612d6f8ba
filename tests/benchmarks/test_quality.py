"""The benchmark of networks on bad faces as a user starts it, on few people and steps; its parts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality import (
    CONDITIONS,
    KINDS,
    LOCAL_WEIGHTS,
    TAKES,
    Seen,
    accuracy,
    attention,
    by_kind,
    moved,
    tar_by_weight,
)

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
    tar_RWS = np.array(report["tar_by_local_weight_RWS"])
    assert tar_RWS.shape == (2, len(LOCAL_WEIGHTS), len(CONDITIONS))
    assert "ahead of its twin on degraded faces" in done.stdout
    assert done.stdout.rstrip().count("\n| pose |") == 1
    for kind in KINDS:
        assert kind in page.read_text()


def seen_of(emb_NSD, unit_NSKD=None, weight_NSK=None):
    shape = (*emb_NSD.shape[:2], 2)
    units = np.stack([emb_NSD, emb_NSD], axis=2) if unit_NSKD is None else unit_NSKD
    return Seen(emb_NSD, units, norms(shape), np.full(shape, 0.5) if weight_NSK is None else weight_NSK)


def norms(shape):
    return np.random.default_rng(0).uniform(1, 2, shape)


def of_two_people():
    """Embeddings of two people that are right under every condition."""
    person_N = np.repeat([0, 1], TAKES)
    return np.eye(2)[np.tile(person_N[:, None], (1, 1 + len(CONDITIONS)))]


def test_accuracy_by_hand():
    """Two people whose pictures are right under every condition but one, where they are each other's."""
    emb_NSD = of_two_people()
    emb_NSD[:, 5] = emb_NSD[::-1, 5]
    figures = accuracy(seen_of(emb_NSD))
    assert figures[4].tolist() == [0, 0]
    assert np.delete(figures, 4, axis=0).min() == 1
    kinds = by_kind(figures[:, 0])
    assert kinds["occlusion"] == 0.75
    assert kinds["none"] == 1
    assert np.isclose(kinds["degraded"], 1 - 0.25 / len(KINDS))


def test_one_weight_for_all_by_hand():
    """The local features are right, the global ones each other's: more than half must be local."""
    emb_NSD = of_two_people()
    tar_WS = np.array(tar_by_weight(seen_of(emb_NSD, np.stack([emb_NSD[::-1], emb_NSD], axis=2))))
    assert (tar_WS[LOCAL_WEIGHTS > 0.55] == 1).all()
    assert (tar_WS[LOCAL_WEIGHTS < 0.45] == 0).all()


def test_attention_is_right_where_it_goes_to_the_nearer_branch():
    emb_NSD = of_two_people()
    shape = emb_NSD.shape[:2]
    turned_NS = np.random.default_rng(1).uniform(0, 1, shape) * (np.arange(shape[1]) > 0)
    local_NSD = np.stack([np.cos(turned_NS), np.sin(turned_NS)], axis=2)
    local_NSD[TAKES:] = local_NSD[TAKES:, :, ::-1]
    right_NS = np.cos(turned_NS)
    for weight_NS, expected in ((right_NS, 1), (1 - right_NS, -1)):
        weight_NSK = np.stack([1 - weight_NS, weight_NS], axis=2)
        one = seen_of(emb_NSD, np.stack([emb_NSD, local_NSD], axis=2), weight_NSK)
        found = attention([one])["weight_and_advantage_R"]
        assert set(found) == set(KINDS)
        assert np.allclose(list(found.values()), expected)


def test_motion_spreads_a_point_along_its_way():
    picture = Image.new("RGB", (112, 112))
    picture.putpixel((56, 56), (250, 250, 250))
    spread_HW = np.asarray(moved(picture, 8, 0.0))[:, :, 0]
    assert np.flatnonzero(spread_HW.any(1)).tolist() == [56]
    assert np.flatnonzero(spread_HW.any(0)).tolist() == list(range(52, 61))
