"""IJB-B and IJB-C in the official layout: a known answer by hand, plain loops as a twin, and broken lists."""

import numpy as np
import pytest

from tests.trainer.evaluation.layouts import write_ijb
from trainer.evaluation.protocol import ProtocolFileError
from trainer.evaluation.protocols.ijb import IJB
from trainer.inference.alignment import TEMPLATE_52

# Templates 10, 20, 30 in galleries, 11 and 12 (subject 1), 21 (subject 2), 91 (subject 9, whom nobody knows).
FACES = [
    (10, 1, 0.9),
    (20, 2, 0.9),
    (30, 3, 0.9),
    (11, 4, 0.9),
    (11, 4, 0.5),
    (12, 5, 0.9),
    (21, 6, 0.9),
    (91, 7, 1),
]
PAIRS = [(10, 11, 1), (10, 12, 1), (20, 21, 1), (10, 21, 0), (20, 91, 0), (30, 91, 0)]
GALLERIES = [[(10, 1), (20, 2)], [(30, 3)]]
PROBES = [(11, 1), (12, 1), (21, 2), (91, 9)]


@pytest.fixture
def small(tmp_path):
    return write_ijb(tmp_path / "IJBC", FACES, PAIRS, [GALLERIES[0], [(30, 3), (20, 2)]], PROBES)


def test_faces_are_those_of_the_list_with_their_points(small):
    protocol = IJB(small)
    assert len(protocol.faces) == 8
    assert protocol.faces[3].path == small / "loose_crop" / "4.jpg"
    assert protocol.faces[3].path.exists()
    np.testing.assert_allclose(protocol.faces[3].landmark_52, TEMPLATE_52, atol=1e-3)
    assert [face.path.name for face in protocol.faces[6:]] == ["7.jpg", "8.jpg"]


def test_known_answer_by_hand(small):
    emb = np.array(
        [
            [1, 0, 0],  # 10
            [0, 2, 0],  # 20
            [0, 0, 1],  # 30
            [1, 0, 0],  # 11, a frame, of weight 0.9
            [
                0,
                1.8,
                0,
            ],  # 11, another frame of weight 0.5: pooled [0.9, 0.9, 0] / 2, 45 degrees from 10 and 20
            [0, 3, 1],  # 12: of subject 1, and found to be 2
            [0, 1, 0.1],  # 21
            [0, 1, 5],  # 91
        ],
        np.float32,
    )
    scores = IJB(small).score(emb)
    one = scores["1:1"]
    # Genuine 0.71, 0.0, 0.99; impostors 0.0, 0.2, 0.98: nothing to measure a FAR of 0.1 by.
    assert one.figures == {}
    np.testing.assert_allclose(one.roc[0], [0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(one.roc[1], [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert one.histogram.genuine_B.sum() == one.histogram.impostor_B.sum() == 3
    assert one.rejection is None
    many = scores["1:N"]
    # In G1, 11 is as near to 20 as to its mate, 12 nearer to 20; in G2 only 21 has a mate.
    np.testing.assert_allclose(many.cmc["G1"][:2], [1 / 3, 1])
    np.testing.assert_allclose(many.cmc["G2"][:2], [1, 1])
    assert many.figures["rank_1"] == pytest.approx(2 / 3)
    assert many.figures["rank_10_G1"] == 1
    assert "G1" not in many.convention
    assert "detector confidence" in one.convention


def test_a_rate_that_one_gallery_is_too_small_for_has_no_mean(tmp_path):
    faces = [(template, template, 1) for template in range(26)]
    galleries, probes = [[(0, 0)], [(t, t) for t in range(1, 12)]], [(13 + s, s) for s in range(13)]
    folder = write_ijb(tmp_path, faces, [(0, 13, 1), (0, 14, 0)], galleries, probes)
    figures = IJB(folder).score(np.random.default_rng(0).normal(size=(26, 4)))["1:N"].figures
    assert [figure for figure in figures if "tpir" in figure] == ["tpir_at_fpir_0.1_G1"]


def twin(emb, faces, pairs, galleries, probes):
    """By plain loops: TAR at FAR 0.1 and 0.01, ranks and TPIR at FPIR 0.1 by gallery; the FNMR at an FMR of
    0.001 by the number of genuine pairs rejected for their shorter template; the number of genuine pairs."""
    pooled, length = {}, {}
    for template in {face[0] for face in faces}:
        rows = [i for i, face in enumerate(faces) if face[0] == template]
        media = {faces[i][1] for i in rows}
        total = sum(
            np.mean([emb[i] * faces[i][2] for i in rows if faces[i][1] == medium], axis=0) for medium in media
        )
        length[template] = np.linalg.norm(total)
        pooled[template] = total / length[template]
    figures = {}
    genuine = np.array([pooled[a] @ pooled[b] for a, b, label in pairs if label])
    impostor = np.sort([pooled[a] @ pooled[b] for a, b, label in pairs if not label])
    for far in (0.1, 0.01):
        figures[f"tar_at_far_{far}"] = (genuine > impostor[-1 - round(far * len(impostor))]).mean()
    quality = np.array([min(length[a], length[b]) for a, b, label in pairs if label])
    missed = genuine <= impostor[-1 - int(0.001 * len(impostor))]
    fnmr = {int((quality < least).sum()): missed[quality >= least].mean() for least in quality}
    for name, gallery in galleries.items():
        ranks, mate, stranger = [], [], []
        for template, subject in probes:
            found = sorted(((pooled[template] @ pooled[t], s) for t, s in gallery), reverse=True)
            if subject in dict(gallery).values():
                ranks.append([s for _, s in found].index(subject))
                mate.append(found[ranks[-1]][0])
            else:
                stranger.append(found[0][0])
        least = np.sort(stranger)[-1 - int(0.1 * len(stranger))]
        figures |= {f"rank_{rank}_{name}": np.mean(np.array(ranks) < rank) for rank in (1, 5, 10)}
        figures[f"tpir_at_fpir_0.1_{name}"] = np.mean(np.array(mate) > least)
    for figure in ("rank_1", "rank_5", "rank_10", "tpir_at_fpir_0.1"):
        figures[figure] = np.mean([figures[f"{figure}_{name}"] for name in galleries])
    return figures, fnmr, len(genuine)


def test_equals_plain_loops(tmp_path):
    rng = np.random.default_rng(0)
    # Subjects 0 to 39: one template each in a gallery, two as probes.
    templates = [(100 + 3 * subject + nth, subject, nth) for subject in range(40) for nth in range(3)]
    faces = [
        (template, 1000 * template + int(rng.integers(3)), round(float(rng.uniform(0.3, 1)), 3))
        for template, _, _ in templates
        for _ in range(rng.integers(1, 6))
    ]
    faces = [faces[i] for i in rng.permutation(len(faces))]
    galleries = [[(t, s) for t, s, nth in templates if nth == 0 and s % 2 == half] for half in (0, 1)]
    probes = [(t, s) for t, s, nth in templates if nth > 0]
    subject_of = {t: s for t, s, _ in templates}
    pairs = [(int(a), int(b)) for a, b in rng.choice(list(subject_of), (1500, 2)) if a != b]
    pairs = [(a, b, int(subject_of[a] == subject_of[b])) for a, b in pairs]
    folder = write_ijb(tmp_path / "IJBB", faces, pairs, galleries, probes, prefix="ijbb")
    centre = rng.normal(size=(40, 12))
    emb = centre[[subject_of[face[0]] for face in faces]] + 0.8 * rng.normal(size=(len(faces), 12))
    emb = (emb * rng.uniform(1, 20, (len(faces), 1))).astype(np.float32)
    scores = IJB(folder).score(emb)
    expected, fnmr, genuine = twin(emb, faces, pairs, dict(zip(("S1", "S2"), galleries, strict=True)), probes)
    found = scores["1:1"].figures | scores["1:N"].figures
    assert 0.2 < expected["rank_1"] < 1
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    curve = scores["1:1"].rejection
    assert 0.05 < curve.fnmr_R[0] < 0.95
    assert dict(zip(np.rint(curve.rejected_R * genuine), curve.fnmr_R, strict=True)) == pytest.approx(fnmr)
    assert scores["1:1"].histogram.impostor_B.sum() == sum(not label for *_, label in pairs)


def line_is_replaced(path, line, text):
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "line", "text", "message"),
    [
        (
            "name_5pts_score.txt",
            2,
            "2.jpg 1 2 3 4 5",
            r"line 2: expected name, landmark \(10 numbers\), confidence",
        ),
        (
            "name_5pts_score.txt",
            3,
            "7.jpg" + " 1" * 11,
            r"line 3: expected 3\.jpg as in .*tid_mid\.txt, found 7\.jpg",
        ),
        ("face_tid_mid.txt", 4, "4.jpg x 4", r"line 4: expected name, template, medium, found '4\.jpg x 4'"),
        (
            "template_pair_label.txt",
            6,
            "30 91 1_0",
            "lines of template, other_template, label, found: ",
        ),
        (
            "template_pair_label.txt",
            2,
            "10 12 99999999999",
            "line 2: expected template, other_template, label",
        ),
        ("template_pair_label.txt", 5, "20 91 2", "line 5: expected the label 0 or 1, found 2"),
        ("template_pair_label.txt", 5, "20 99 0", "expected templates that have a face, found 99 and 0 more"),
        ("1N_probe_mixed.csv", 3, "11;1", "line 3: expected template, subject, found '11;1'"),
        (
            "1N_gallery_G1.csv",
            3,
            "10,4,a,1,2",
            "line 3: expected one subject for template 10, found 4 and another",
        ),
        ("1N_gallery_G2.csv", 2, "77,3,a,1,2", "expected templates that have a face, found 77 and 0 more"),
    ],
)
def test_a_bad_line_is_named(small, name, line, text, message):
    line_is_replaced(small / "meta" / f"ijbc_{name}", line, text)
    with pytest.raises(ProtocolFileError, match=rf"ijbc_{name}.*{message}"):
        IJB(small)


@pytest.mark.parametrize(
    "name", ["name_5pts_score.txt", "template_pair_label.txt", "1N_gallery_G2.csv", "1N_probe_mixed.csv"]
)
def test_a_missing_or_empty_list_is_named(small, name):
    path = small / "meta" / f"ijbc_{name}"
    path.write_text("")
    with pytest.raises(ProtocolFileError, match=f"ijbc_{name}: expected lines of .*, found none"):
        IJB(small)
    path.unlink()
    with pytest.raises(
        ProtocolFileError, match=f"ijbc_{name}: expected the official layout, found: No such file"
    ):
        IJB(small)


def test_a_gallery_that_no_probe_has_a_mate_in_is_told(tmp_path):
    folder = write_ijb(tmp_path, FACES, PAIRS, [[(10, 1)], [(30, 3)]], PROBES)
    with pytest.raises(
        ProtocolFileError, match=r"probe_mixed\.csv: expected probes .* gallery G2, found none"
    ):
        IJB(folder)


def test_another_folder_is_told(tmp_path):
    with pytest.raises(ProtocolFileError, match="name the folder that holds loose_crop and meta"):
        IJB(tmp_path)


def test_embeddings_that_do_not_fit_or_have_no_direction_are_told(small):
    protocol = IJB(small)
    with pytest.raises(ValueError, match=r"expected 8 embeddings, one for each image, found shape \(7, 4\)"):
        protocol.score(np.ones((7, 4), np.float32))
    emb = np.ones((8, 4), np.float32)
    for value, found in ((0, "only zeros"), (np.nan, "NaN or infinity")):
        emb[5] = value
        with pytest.raises(
            ValueError, match=rf"6\.jpg: expected a finite embedding other than zero, found {found}"
        ):
            protocol.score(emb)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_confidence_that_is_not_finite_is_refused(small, bad):
    path = small / "meta" / "ijbc_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    lines[2] = " ".join([*lines[2].split()[:-1], bad])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ProtocolFileError, match=r"expected finite numbers as confidence.* line 3"):
        IJB(small)
