"""Accuracy by nuisance, on a set with known results."""

import numpy as np
import pytest

from trainer.evaluation.metrics.by_nuisance import by_nuisance
from trainer.evaluation.metrics.verification import verify_similarities

PAIRS = 120
FIELDS = ("yaw_deg", "warp", "exposure_stops", "blur_px", "resolution", "jpeg_quality")


def nuisances():
    nuisance_2P = np.zeros(2 * PAIRS, [*((name, float) for name in FIELDS), ("occlusion", "U16")])
    nuisance_2P["occlusion"] = "none"
    nuisance_2P["resolution"] = 1.0
    return nuisance_2P


def result_with_wrong(wrong_P):
    """Return a result in which only the given pairs are wrong; half of each fold is genuine."""
    issame_P = np.arange(PAIRS) % 2 == 0
    similarity_P = np.where(issame_P ^ wrong_P, 0.9, 0.1)
    result = verify_similarities(similarity_P, issame_P)
    np.testing.assert_array_equal(result.correct, ~wrong_P)
    return result


def test_the_harder_image_of_a_pair_counts():
    wrong_P = np.arange(PAIRS) % 3 == 0
    nuisance_2P = nuisances()
    # The wrong pairs are those with one strongly turned image; the sign does not matter.
    nuisance_2P["yaw_deg"][1::2] = np.where(wrong_P, -30.0, 3.0)
    found = by_nuisance(result_with_wrong(wrong_P), nuisance_2P)["turn of the head"]
    assert found == [("least third", 1.0, 40), ("middle third", 1.0, 40), ("most third", 0.0, 40)]


def test_low_resolution_is_the_harder_end():
    wrong_P = np.arange(PAIRS) < 12
    nuisance_2P = nuisances()
    nuisance_2P["resolution"][::2] = np.where(wrong_P, 0.3, 1.0)
    found = by_nuisance(result_with_wrong(wrong_P), nuisance_2P)["low resolution"]
    assert [accuracy for _, accuracy, _ in found] == [1.0, 1.0, 0.7]


def test_occlusion_by_the_number_of_images():
    wrong_P = np.arange(PAIRS) < 10
    nuisance_2P = nuisances()
    nuisance_2P["occlusion"][: 2 * 20 : 2] = "mask"
    nuisance_2P["occlusion"][1 : 2 * 5 : 2] = "hand"
    found = by_nuisance(result_with_wrong(wrong_P), nuisance_2P)["occlusion"]
    assert found == [
        ("neither image", 1.0, 100),
        ("one image", pytest.approx(10 / 15), 15),
        ("both images", 0.0, 5),
    ]


def test_a_table_of_another_set():
    with pytest.raises(ValueError, match="nuisances of 240 images, found those of 239"):
        by_nuisance(result_with_wrong(np.arange(PAIRS) < 3), nuisances()[1:])
