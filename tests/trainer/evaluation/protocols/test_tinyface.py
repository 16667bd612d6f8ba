"""TinyFace in the official layout: a known answer by hand, and folders that are not as they should be."""

import numpy as np
import pytest

from tests.trainer.evaluation.layouts import write_tinyface
from trainer.evaluation.protocol import ProtocolFileError
from trainer.evaluation.protocols.tinyface import TinyFace


@pytest.fixture
def small(tmp_path):
    return write_tinyface(
        tmp_path / "Testing_Set",
        ["12_1.jpg", "3_4.jpg", "3_5.jpg"],
        ["12_2.jpg", "3_1.jpg", "3_2.jpg"],
        [f"{i}.jpg" for i in range(25)] + ["3_9_stranger.jpg"],
    )


def test_faces_come_probes_first_and_are_there(small):
    faces = TinyFace(small).faces
    assert len(faces) == 32
    assert [str(face.path.relative_to(small)) for face in faces[:5]] == [
        "Probe/12_1.jpg",
        "Probe/3_4.jpg",
        "Probe/3_5.jpg",
        "Gallery_Match/12_2.jpg",
        "Gallery_Match/3_1.jpg",
    ]
    assert all(face.path.exists() and face.landmark_52 is None for face in faces)


def on_circle(degrees):
    return np.array([[np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))] for d in degrees], np.float32)


def test_known_answer_by_hand(small):
    # Degrees on a circle; strangers from 40 to 65, and one, whose name has a person's number, at 1.
    strangers = sorted((f"{i}.jpg", 40.0 + i) for i in range(25))
    degrees = [0, 38, 100, 10, 99, 70, *(place for _, place in strangers), 1]
    scores = TinyFace(small).score(7 * on_circle(degrees))["identification"]
    # 12_1 at 0: the stranger at 1, then its mate: place 2.
    # 3_4 at 38: 25 strangers at 40 to 64 and 12_2 at 10 (28 away) come before 3_2 at 70 (32 away), and one
    # stranger more (37 away) before 3_1 at 99: places 27 and 29.
    # 3_5 at 100: mates at 99 and 70: places 1 and 2.
    area = [(0 + 1 / 2) / 2, ((0 + 1 / 27) + (1 / 28 + 2 / 29)) / 4, 1]
    assert scores.figures == pytest.approx(
        {"rank_1": 1 / 3, "rank_5": 2 / 3, "rank_20": 2 / 3, "map": np.mean(area)}
    )
    np.testing.assert_allclose(scores.cmc["all probes"][[25, 26]], [2 / 3, 1])
    assert "not fine-tuned" in scores.convention


def test_what_is_missing_is_named(small):
    (small / "Gallery_Match" / "12_2.jpg").unlink()
    with pytest.raises(ProtocolFileError, match=r"Probe/12_1\.jpg: expected another image of this identity"):
        TinyFace(small)
    (small / "Probe" / "12_1.jpg").rename(small / "Probe" / "twelve.jpg")
    with pytest.raises(ProtocolFileError, match=r"Probe/twelve\.jpg: expected a name such as 12_3\.jpg"):
        TinyFace(small)


@pytest.mark.parametrize("kind", ["Probe", "Gallery_Match", "Gallery_Distractor"])
def test_a_folder_that_is_empty_or_missing_is_named(small, kind):
    for path in (small / kind).iterdir():
        path.unlink()
    with pytest.raises(ProtocolFileError, match=f"{kind}: expected images, found none"):
        TinyFace(small)
    (small / kind).rmdir()
    with pytest.raises(ProtocolFileError, match=f"{kind}: .*found: No such file"):
        TinyFace(small)
