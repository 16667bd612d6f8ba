"""The benchmark on degraded faces: its command with few identities and steps, and its parts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality import (
    CONDITIONS,
    GLOBAL,
    KINDS,
    LOCAL,
    LOCAL_WEIGHTS,
    TAKES,
    Seen,
    accuracy,
    advantage,
    attention,
    by_kind,
    gain_of_best,
    motion_blurred,
    normalized,
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
    assert done.stdout.count("\n| pose |") == 1
    for kind in KINDS:
        assert kind in page.read_text()


def of_two_people():
    """Return embeddings of two identities that are correct under every condition."""
    person_N = np.repeat([0, 1], TAKES)
    return np.eye(2)[np.tile(person_N[:, None], (1, 1 + len(CONDITIONS)))]


def test_accuracy_by_hand():
    """Two identities whose embeddings are correct, except under one condition, where they are swapped."""
    emb_NSD = of_two_people()
    emb_NSD[:, 5] = emb_NSD[::-1, 5]
    figures = accuracy(emb_NSD)
    assert figures[4].tolist() == [0, 0]
    assert np.delete(figures, 4, axis=0).min() == 1
    kinds = by_kind(figures[:, 0])
    assert kinds["occlusion"] == 0.75
    assert kinds["none"] == 1
    assert np.isclose(kinds["degraded"], 1 - 0.25 / len(KINDS))


def test_one_weight_for_all_by_hand():
    """Local features are correct, global ones swapped: accuracy needs a local weight above one half."""
    local_NSD = of_two_people()
    global_NSD = np.concatenate([local_NSD[:, :1], local_NSD[::-1, 1:]], axis=1)
    tar_WS = np.array(tar_by_weight(np.stack([global_NSD, local_NSD], axis=2)))
    weights = np.array(LOCAL_WEIGHTS)
    assert (tar_WS[weights > 0.55] == 1).all()
    assert (tar_WS[weights < 0.45] == 0).all()


def test_the_best_weight_is_chosen_by_the_other_seeds():
    tar_RW = np.array([[0.9, 0.1, 0.2], [0.1, 0.7, 0.2], [0.1, 0.6, 0.5]])
    best_R, gain_R = gain_of_best(tar_RW, np.array([0.4, 0.5, 0.3]))
    assert best_R == [1, 0, 0]
    assert np.allclose(gain_R, [0.1 - 0.4, 0.1 - 0.5, 0.1 - 0.3])


def test_advantage_against_loops():
    rng = np.random.default_rng(0)
    unit_NSKD = normalized(rng.normal(size=(3 * TAKES, 4, 2, 8)))
    found_NS = advantage(unit_NSKD)
    for n, s in np.ndindex(found_NS.shape):
        good = []
        for k in range(2):
            cosines = [float(unit_NSKD[m, 0, k] @ unit_NSKD[n, s, k]) for m in range(3 * TAKES)]
            others = [cosine for m, cosine in enumerate(cosines) if m // TAKES != n // TAKES]
            good.append((cosines[n] - np.mean(others)) / np.std(others))
        assert np.isclose(found_NS[n, s], good[LOCAL] - good[GLOBAL])


def test_attention_correlates_with_the_better_branch_within_one_strength():
    rng = np.random.default_rng(0)
    unit_NSKD = normalized(rng.normal(size=(40 * TAKES, 1 + len(CONDITIONS), 2, 8)))
    norm_NSK = rng.uniform(1, 2, unit_NSKD.shape[:3])
    better_NS = advantage(unit_NSKD)
    drift_S = np.arange(better_NS.shape[1]) * 100  # of the weight between strengths, which must not count
    for weight_NS, expected in (
        (better_NS + drift_S, 1),
        (drift_S - better_NS, -1),
        (rng.normal(size=better_NS.shape) + drift_S, 0),
        (np.full(better_NS.shape, 0.5), 0),
    ):
        seen = Seen(unit_NSKD[:, :, 0], unit_NSKD, norm_NSK, np.stack([1 - weight_NS, weight_NS], axis=2))
        found = attention([seen])["weight_and_advantage_R"]
        assert set(found) == set(KINDS)
        assert np.allclose(list(found.values()), expected, atol=0.2 if expected == 0 else 1e-6)


def test_motion_blur_spreads_a_point_along_a_line():
    image = Image.new("RGB", (112, 112))
    image.putpixel((56, 56), (250, 250, 250))
    spread_HW = np.asarray(motion_blurred(image, 8, 0.0))[:, :, 0]
    assert np.flatnonzero(spread_HW.any(1)).tolist() == [56]
    assert np.flatnonzero(spread_HW.any(0)).tolist() == list(range(52, 61))
