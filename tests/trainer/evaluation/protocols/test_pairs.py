"""A verification file as a protocol: its images in order, and the length of embeddings as quality."""

import numpy as np
import pytest

from data_pipeline.formats.pair_file import write_pairs
from trainer.evaluation.metrics.verification import verify
from trainer.evaluation.protocols.pairs import PairVerification

PAIRS = 2200


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """Every other pair shows one person."""
    path = tmp_path_factory.mktemp("pairs") / "set.bin"
    write_pairs(path, [b"%d" % i for i in range(2 * PAIRS)], [True, False] * (PAIRS // 2))
    return PairVerification(path)


def embeddings():
    """Impostors at right angles; every other genuine pair too, of which one embedding is short."""
    emb_ND = np.zeros((2 * PAIRS, 2), np.float32)
    emb_ND[0::2, 0], emb_ND[1::2, 1] = 2, 2
    emb_ND[1::8] = (2, 0)  # found: pairs 0, 4, 8...
    emb_ND[5::16, 1] = 0.5  # missed: pairs 2, 6, 10..., by turns the second or the first is short
    emb_ND[12::16, 0] = 0.5
    return emb_ND


def test_the_faces_are_the_images_of_the_file(protocol):
    assert len(protocol.faces) == 2 * PAIRS
    face = protocol.faces[43]
    assert (face.encoded, face.landmark_52) == (b"43", None)
    assert str(face.path).endswith("set.bin/image 43")
    assert [face.encoded for face in protocol.faces[:6:2]] == [b"0", b"2", b"4"]


def test_scores_are_those_of_the_pair_protocol(protocol):
    scores = protocol.score(embeddings())["verification"]
    result = verify(embeddings(), protocol.pairs.issame_P)
    assert scores.figures == result.summary()
    assert scores.figures["accuracy"] == pytest.approx(0.75)
    np.testing.assert_array_equal(scores.roc, (result.far_R, result.tar_R))
    assert scores.histogram.genuine_B.sum() == scores.histogram.impostor_B.sum() == PAIRS // 2


def test_rejecting_pairs_with_a_short_embedding_first_takes_the_errors_away(protocol):
    """Half of the genuine pairs are missed; they are the ones of which one embedding is short."""
    rejection = protocol.score(embeddings())["verification"].rejection
    assert rejection.fmr == 1e-3
    assert rejection.rejected_R.tolist() == [0, 0.5]
    assert rejection.fnmr_R.tolist() == [0.5, 0]


def test_an_embedding_without_direction_is_named_by_its_image(protocol):
    emb_ND = embeddings()
    emb_ND[7] = np.nan
    with pytest.raises(ValueError, match=r"set\.bin/image 7: expected a finite embedding other than zero"):
        protocol.score(emb_ND)
