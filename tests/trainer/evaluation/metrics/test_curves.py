"""Curves of genuine and impostor similarities: known answers by hand, and the pair protocol's as a twin."""

import numpy as np
import pytest

from trainer.evaluation.metrics import curves as pair_curves
from trainer.evaluation.metrics import verification as pair_protocol


def test_known_answer_by_hand():
    genuine, impostor = np.array([0.9, 0.8, 0.3, 0.2]), np.array([0.85, 0.5, 0.25, 0.1, 0.0])
    # One of five impostors may be accepted: what exceeds 0.5 is accepted.
    assert pair_curves.strict_threshold(impostor, 0.2) == 0.5
    figures = pair_curves.tar_at_far(genuine, impostor, (0.2, 0.4, 0.1))
    assert figures == {"tar_at_far_0.2": 0.5, "tar_at_far_0.4": 0.75}
    far, tar = pair_curves.roc(genuine, impostor)
    np.testing.assert_allclose(far, [0, 0, 0.2, 0.4, 0.6, 1])
    np.testing.assert_allclose(tar, [0, 0.25, 0.5, 0.75, 1, 1])


def test_too_few_impostors_tell_nothing_about_a_rate():
    assert pair_curves.strict_threshold(np.zeros(9), 0.1) is None
    assert pair_curves.strict_threshold(np.arange(10.0), 0.1) == 8


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_equals_the_pair_protocol_with_and_without_ties(digits):
    rng = np.random.default_rng(digits)
    issame = rng.random(3000) < 0.3
    similarity = np.round(np.clip(rng.normal(np.where(issame, 0.5, 0.1), 0.2), -1, 1), digits)
    genuine, impostor = similarity[issame], similarity[~issame]
    fars = (1e-3, 1e-2, 1e-1)
    judged = pair_protocol.judge(similarity, issame, fars=fars)
    assert pair_curves.tar_at_far(genuine, impostor, fars) == pytest.approx(
        {f"tar_at_far_{far:g}": tar for far, tar in judged.tar_at_far.items()}
    )
    # Between the corners TAR stays, so they give the best TAR at every FAR of the full curve.
    far, tar = pair_curves.roc(genuine, impostor)
    for rate in np.unique(judged.far_R):
        best = judged.tar_R[judged.far_R == rate].max()
        assert tar[far <= rate + 1e-12].max() == pytest.approx(best)


def test_histogram_counts_every_pair_once():
    counts = pair_curves.histogram(np.array([1.0000001, 0.005, -1.0]), np.array([0.0049, 0.0051]))
    assert counts.genuine_B.sum() == 3
    assert counts.genuine_B[[-1, 100, 0]].tolist() == [1, 1, 1]
    assert counts.impostor_B[100] == 2
    assert counts.edge_B1[[0, 100, 200]].tolist() == [-1, 0, 1]


def test_rejecting_the_worst_pairs_takes_the_errors_that_they_make():
    impostor = np.linspace(0, 0.5, 1001)
    # The threshold is the second largest impostor; who only equals it is not accepted.
    genuine = np.array([0.1, 0.9, impostor[-2], 0.9, 0.9])
    quality = np.array([1.0, 9.0, 2.0, 3.0, 3.0])
    curve = pair_curves.rejection(genuine, quality, impostor, 1e-3)
    np.testing.assert_allclose(curve.rejected_R, [0, 0.2, 0.4, 0.8])
    np.testing.assert_allclose(curve.fnmr_R, [0.4, 0.25, 0, 0])
    assert curve.fmr == 1e-3
    assert pair_curves.rejection(genuine, quality, impostor[:100], 1e-3) is None


def test_rejection_equals_a_plain_loop_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    genuine, quality, impostor = rng.random(1000), rng.integers(0, 300, 1000), rng.random(2000)
    curve = pair_curves.rejection(genuine, quality, impostor, 0.01)
    least = np.sort(impostor)[-21]
    assert 50 < len(curve.rejected_R) <= 100
    for rejected, fnmr in zip(curve.rejected_R, curve.fnmr_R, strict=True):
        worst = np.sort(quality)[round(rejected * 1000)]
        assert (quality < worst).mean() == pytest.approx(rejected)
        assert (genuine[quality >= worst] <= least).mean() == pytest.approx(fnmr)
    order = rng.permutation(1000)
    shuffled = pair_curves.rejection(genuine[order], quality[order], impostor, 0.01)
    np.testing.assert_array_equal(shuffled.fnmr_R, curve.fnmr_R)
