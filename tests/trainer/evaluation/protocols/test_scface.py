"""SCFace in the official layout: both conventions, by hand and by a plain loop, and what may be missing."""

import numpy as np
import pytest

from tests.trainer.evaluation.layouts import put_image, write_scface
from trainer.evaluation.protocol import ProtocolFileError
from trainer.evaluation.protocols.scface import SCFace
from trainer.inference.alignment import TEMPLATE_52


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scface(tmp_path_factory.mktemp("scface") / "SCface_database")


def test_faces_are_mugshots_then_each_distance_and_camera(folder):
    faces = SCFace(folder).faces
    assert len(faces) == 130 + 3 * 5 * 130
    assert faces[129].path.name == "130_frontal.jpg"
    assert faces[130].path.relative_to(folder).parts == (
        "surveillance_cameras_distance_1",
        "cam_1",
        "001_cam1_1.jpg",
    )
    assert faces[-1].path.name == "130_cam5_3.jpg"
    assert all(face.path.exists() for face in faces[::100])
    # The eyes stand from left to right whatever their order in the list, and the mouth twice.
    mouth = TEMPLATE_52[3:].mean(0)
    np.testing.assert_allclose(faces[7].landmark_52, [*TEMPLATE_52[:3], mouth, mouth], atol=0.01)


def label_of(face):
    subject, *kind = face.path.stem.split("_")
    return int(subject) - 1, kind[-1]


def test_equals_a_plain_loop_in_both_conventions(folder):
    protocol = SCFace(folder)
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(130, 16))
    noise = {"frontal": 0.1, "1": 1.0, "2": 0.7, "3": 0.3}
    labels = [label_of(face) for face in protocol.faces]
    emb = np.array([centre[s] + noise[kind] * rng.normal(size=16) for s, kind in labels], np.float32)
    scores = protocol.score(9 * emb)
    for name, subjects in (("all subjects", range(130)), ("last 80 subjects", range(50, 130))):
        gallery = np.array([emb[s] / np.linalg.norm(emb[s]) for s in subjects])
        rates = {}
        for distance in "123":
            right = [
                subjects[int(np.argmax(gallery @ vector))] == subject
                for vector, (subject, kind) in zip(emb, labels, strict=True)
                if kind == distance and subject in subjects
            ]
            assert len(right) == 5 * len(subjects)
            rates[f"rank_1_d{distance}"] = np.mean(right)
        assert 0.1 < rates["rank_1_d1"] < rates["rank_1_d2"] < rates["rank_1_d3"]
        assert scores[name].figures == pytest.approx(rates | {"rank_1_mean": np.mean(list(rates.values()))})
        assert [curve[-1] for curve in scores[name].cmc.values()] == [1, 1, 1]
        assert str(5 * len(subjects)) in scores[name].convention


def test_one_mistake_counts_in_its_distance_alone(folder):
    protocol = SCFace(folder)
    emb = np.array([np.eye(130)[label_of(face)[0]] for face in protocol.faces], np.float32)
    wrong = [face.path.name for face in protocol.faces].index("060_cam4_2.jpg")
    emb[wrong] = np.eye(130)[10]  # a subject who is no part of the last 80: nobody's, so not found either
    scores = protocol.score(emb)
    assert scores["all subjects"].figures == pytest.approx(
        {"rank_1_d1": 1, "rank_1_d2": 649 / 650, "rank_1_d3": 1, "rank_1_mean": (2 + 649 / 650) / 3}
    )
    assert scores["last 80 subjects"].figures["rank_1_d2"] == pytest.approx(399 / 400)


def test_suffixes_may_be_written_large(folder):
    path = folder / "mugshot_frontal_original_all" / "002_frontal.jpg"
    path.rename(path.with_suffix(".JPG"))
    assert SCFace(folder).faces[1].path == path.with_suffix(".JPG")
    path.with_suffix(".JPG").rename(path)


def test_what_is_missing_is_named(folder):
    path = folder / "surveillance_cameras_distance_2" / "cam_3" / "077_cam3_2.jpg"
    path.unlink()
    with pytest.raises(
        ProtocolFileError, match=r"cam_3: expected 130 images, found no 077_cam3_2\.jpg and 0 more"
    ):
        SCFace(folder)
    put_image(path)
    coordinates = folder / "all.txt"
    lines = coordinates.read_text()
    coordinates.write_text(lines.replace("077_cam3_2\t", "777_cam3_2\t"))
    with pytest.raises(
        ProtocolFileError, match=r"all\.txt: expected a line for every image, found none for 077_cam3_2"
    ):
        SCFace(folder)
    coordinates.write_text(lines)
