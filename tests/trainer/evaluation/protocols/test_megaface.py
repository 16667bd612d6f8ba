"""MegaFace in the official layout: a known answer by hand, a plain loop as a twin, noise, broken lists."""

import numpy as np
import pytest

from tests.trainer.evaluation.layouts import write_megaface
from trainer.evaluation.metrics import similarity
from trainer.evaluation.protocol import ProtocolFileError
from trainer.evaluation.protocols.megaface import MegaFace

PROBES = [
    ("A_B/A_B_1.png", "A_B"),
    ("A_B/A_B_2.png", "A_B"),
    ("C_D/C_D_7.png", "C_D"),
    ("C_D/C_D_8.png", "C_D"),
]
DISTRACTORS = {10: [f"1/2@N00/{i}_1.jpg" for i in range(10)]}


@pytest.fixture
def small(tmp_path):
    return write_megaface(tmp_path, PROBES, DISTRACTORS)


def on_circle(degrees):
    return np.array([[np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))] for d in degrees], np.float32)


def test_faces_are_the_probes_then_the_distractors(small):
    faces = MegaFace(small).faces
    assert len(faces) == 14
    assert faces[2].path == small / "facescrub_images" / "C_D" / "C_D_7.png"
    assert faces[4].path == small / "megaface_images" / "1" / "2@N00" / "0_1.jpg"
    assert all(face.path.exists() and face.landmark_52 is None for face in faces)


def test_known_answer_by_hand(small):
    # A_B at 0 and 20 with a stranger at 15, who is nearer to either than the other. C_D at 90 and 100, the
    # other strangers far away: each finds the other at once.
    emb = on_circle([0, 20, 90, 100, 15, *range(200, 209)])
    scores = MegaFace(small).score(3 * emb)["identification"]
    assert scores.figures == pytest.approx({"rank_1_at_10": 0.5})
    np.testing.assert_allclose(scores.cmc["10 distractors"][:2], [0.5, 1])
    assert "with noise;" in scores.convention
    # The most similar impostors are 5 degrees apart: no genuine pair is nearer.
    assert [curve.tolist() for curve in scores.roc] == [[0], [0]]


@pytest.mark.parametrize("held", [1 << 25, 5000])
def test_equals_a_plain_loop_over_the_whole_matrix(tmp_path, held, monkeypatch):
    monkeypatch.setattr(similarity, "_SIMILARITIES", held)
    rng = np.random.default_rng(0)
    persons = np.repeat(np.arange(30), 4)
    probes = [(f"{person}/{nth}.png", f"{person}") for nth, person in enumerate(persons)]
    names = [f"{i:05d}.jpg" for i in range(10_100)]
    # The list of a hundred holds strangers that the longest one does not.
    sets = {100: names[10_000:], 10_000: [names[i] for i in rng.permutation(10_000)]}
    protocol = MegaFace(write_megaface(tmp_path, probes, sets, images=False))
    centre = rng.normal(size=(30, 8))
    emb = np.concatenate([centre[persons] + 0.5 * rng.normal(size=(120, 8)), rng.normal(size=(10_100, 8))])
    # A stranger of the longest list is like the first probe: the one false accept that a FAR of 1e-6 allows.
    # Only the last identity's images are more alike than any other stranger.
    emb[125], emb[116:120] = emb[0], centre[29] + 0.001 * rng.normal(size=(4, 8))
    emb = emb.astype(np.float32)
    scores = protocol.score(emb)["identification"]

    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    matrix = unit[:120] @ unit.T
    pairs = [(i, j) for i in range(120) for j in range(120) if i != j and persons[i] == persons[j]]
    for size, columns in ((100, slice(10_120, None)), (10_000, slice(120, 10_120))):
        rank = np.array([1 + (matrix[i, columns] > matrix[i, j]).sum() for i, j in pairs])
        assert 0.02 < (rank == 1).mean() < 0.99
        assert scores.figures[f"rank_1_at_{size}"] == pytest.approx((rank == 1).mean())
        curve = scores.cmc[f"{size} distractors"]
        np.testing.assert_allclose(curve, [(rank <= r).mean() for r in range(1, 101)])
    # 120 x 10,000 impostor pairs: a FAR of 1e-6 is one of them, the ROC holds the 120 most similar.
    impostor = np.sort(matrix[:, 120:10_120].ravel())
    genuine = np.array([matrix[i, j] for i, j in pairs])
    assert 0 < scores.figures["tar_at_far_1e-06"] < 0.1
    assert scores.figures["tar_at_far_1e-06"] == pytest.approx((genuine > impostor[-2]).mean())
    far, tar = scores.roc
    assert 0 < far.max() <= 1e-4
    rises_R, first_R = np.unique(tar, return_index=True)
    for rate, rises in zip(far[first_R[1:]], rises_R[1:], strict=True):
        least = np.sort(genuine)[-round(rises * len(genuine))] - 1e-6
        assert (impostor >= least).mean() == pytest.approx(rate)


def test_noise_is_left_out_where_there_are_lists(small):
    (small / "facescrub_noises.txt").write_text("# wrong person\nA_B_2.png\n")
    (small / "megaface_noises.txt").write_text("#\n1\t1/2@N00/3_1.jpg\n1/2@N00/4_1.jpg\n")
    protocol = MegaFace(small)
    names = [face.path.name for face in protocol.faces]
    assert len(names) == 3 + 8
    assert not {"A_B_2.png", "3_1.jpg", "4_1.jpg"} & set(names)
    scores = protocol.score(on_circle([0, 90, 100, *range(200, 208)]))["identification"]
    assert scores.figures["rank_1_at_10"] == 1
    assert "without the images in facescrub_noises.txt and megaface_noises.txt;" in scores.convention


def test_the_convention_says_which_noise_was_left_out(small):
    (small / "facescrub_noises.txt").write_text("C_D_8.png\n")
    scores = MegaFace(small).score(on_circle(range(13)))["identification"]
    assert "without the images in facescrub_noises.txt;" in scores.convention


def test_broken_lists_are_named(small):
    lists = small / "devkit" / "templatelists"
    path = lists / "megaface_features_list.json_10_1"
    path.write_text('{"path": ["a.jpg"]}')
    with pytest.raises(ProtocolFileError, match=r"json_10_1: expected 10 paths, found 1"):
        MegaFace(small)
    for text in ("[1]", '{"paths": []}', "{", '{"path": [1]}', '{"path": []}'):
        path.write_text(text)
        with pytest.raises(ProtocolFileError, match=r"json_10_1: expected (JSON with a list|file names in)"):
            MegaFace(small)
    path.unlink()
    with pytest.raises(
        ProtocolFileError, match=r"templatelists: expected megaface_features_list\.json_1000000_1"
    ):
        MegaFace(small)
    probes = lists / "facescrub_features_list.json"
    probes.write_text('{"path": ["a/1.png"], "id": ["a", "b"]}')
    with pytest.raises(ProtocolFileError, match="expected an id for each path, found 1 paths and 2 ids"):
        MegaFace(small)
    probes.write_text('{"path": ["a/1.png", "b/1.png"], "id": ["a", "b"]}')
    with pytest.raises(ProtocolFileError, match="expected two or more images of an identity"):
        MegaFace(small)
    probes.unlink()
    with pytest.raises(ProtocolFileError, match=r"facescrub_features_list\.json: .*found: No such file"):
        MegaFace(small)
