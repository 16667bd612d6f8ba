"""Accuracy by circumstance, on a set whose answer is known."""

import numpy as np
import pytest

from trainer.evaluation.metrics.by_nuisance import by_nuisance
from trainer.evaluation.metrics.verification import judge

PAIRS = 120
FIELDS = ("yaw_deg", "warp", "exposure_stops", "blur_px", "resolution", "jpeg_quality")


def pictures():
    picture_2P = np.zeros(2 * PAIRS, [*((name, float) for name in FIELDS), ("occlusion", "U16")])
    picture_2P["occlusion"] = "none"
    picture_2P["resolution"] = 1.0
    return picture_2P


def result_with_wrong(wrong_P):
    """Every pair is clear but those that are wrong: half genuine, half impostor in each fold."""
    issame_P = np.arange(PAIRS) % 2 == 0
    similarity_P = np.where(issame_P ^ wrong_P, 0.9, 0.1)
    result = judge(similarity_P, issame_P)
    np.testing.assert_array_equal(result.correct, ~wrong_P)
    return result


def test_the_worse_picture_of_a_pair_counts():
    wrong_P = np.arange(PAIRS) % 3 == 0
    picture_2P = pictures()
    # The wrong pairs are those with one strongly turned picture; the sign does not matter.
    picture_2P["yaw_deg"][1::2] = np.where(wrong_P, -30.0, 3.0)
    found = by_nuisance(result_with_wrong(wrong_P), picture_2P)["turn of the head"]
    assert found == [("least third", 1.0, 40), ("middle third", 1.0, 40), ("most third", 0.0, 40)]


def test_low_resolution_is_the_harder_end():
    wrong_P = np.arange(PAIRS) < 12
    picture_2P = pictures()
    picture_2P["resolution"][::2] = np.where(wrong_P, 0.3, 1.0)
    found = by_nuisance(result_with_wrong(wrong_P), picture_2P)["low resolution"]
    assert [accuracy for _, accuracy, _ in found] == [1.0, 1.0, 0.7]


def test_occlusion_by_the_number_of_pictures():
    wrong_P = np.arange(PAIRS) < 10
    picture_2P = pictures()
    picture_2P["occlusion"][: 2 * 20 : 2] = "mask"
    picture_2P["occlusion"][1 : 2 * 5 : 2] = "hand"
    found = by_nuisance(result_with_wrong(wrong_P), picture_2P)["occlusion"]
    assert found == [
        ("neither picture", 1.0, 100),
        ("one picture", pytest.approx(10 / 15), 15),
        ("both pictures", 0.0, 5),
    ]


def test_a_table_of_another_set():
    with pytest.raises(ValueError, match="circumstances of 240 pictures, found 239"):
        by_nuisance(result_with_wrong(np.arange(PAIRS) < 3), pictures()[1:])
