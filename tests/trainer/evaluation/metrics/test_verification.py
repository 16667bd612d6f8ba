"""The pair protocol: against loops that try everything, against answers by hand, and at its edges."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.metrics.verification import (
    best_threshold,
    cosine_similarity,
    histogram,
    rejection,
    roc,
    tar_at_far,
    threshold_at,
    verify,
    verify_similarities,
)

# Few different values, so that equal similarities occur in almost every example; and any values at all.
SIMILARITY = st.one_of(st.integers(-3, 3).map(lambda n: n / 3), st.floats(-1, 1))
PAIRS = st.lists(st.tuples(SIMILARITY, st.booleans()), min_size=1, max_size=24)
BOTH_KINDS = PAIRS.filter(lambda pairs: len({same for _, same in pairs}) == 2)


def arrays(pairs):
    similarity_P, issame_P = zip(*pairs, strict=True)
    return np.array(similarity_P, float), np.array(issame_P, bool)


def judged_right(pairs, threshold):
    return sum((similarity >= threshold) == same for similarity, same in pairs)


def thresholds_strictest_first(pairs):
    values = sorted({similarity for similarity, _ in pairs}, reverse=True)
    middles = [
        low + (high - low) / 2 if low + (high - low) / 2 > low else high
        for high, low in itertools.pairwise(values)
    ]
    return [math.nextafter(1, 2), *middles, -1.0]


def twin_of_best_threshold(pairs):
    candidates = thresholds_strictest_first(pairs)
    scores = [judged_right(pairs, threshold) for threshold in candidates]
    return candidates[scores.index(max(scores))]


def twin_of_folds(pairs, folds):
    """The accuracy and the threshold of each fold, cut one pair after the other."""
    sizes = [len(pairs) // folds + (k < len(pairs) % folds) for k in range(folds)]
    results, start = [], 0
    for size in sizes:
        tested, others = pairs[start : start + size], pairs[:start] + pairs[start + size :]
        threshold = twin_of_best_threshold(others)
        results.append((judged_right(tested, threshold) / size, threshold))
        start += size
    return results


def twin_of_roc(pairs):
    genuine = [similarity for similarity, same in pairs if same]
    impostor = [similarity for similarity, same in pairs if not same]
    return [
        (sum(s >= t for s in impostor) / len(impostor), sum(s >= t for s in genuine) / len(genuine))
        for t in [math.nextafter(1, 2), *sorted({similarity for similarity, _ in pairs}, reverse=True)]
    ]


def twin_of_auc(pairs):
    """How often a genuine pair is more similar than an impostor pair; equal ones count half."""
    wins = [
        (genuine > impostor) + (genuine == impostor) / 2
        for genuine, same in pairs
        for impostor, also_same in pairs
        if same and not also_same
    ]
    return sum(wins) / len(wins)


@given(pairs=PAIRS)
def test_no_threshold_at_all_is_better_than_the_best(pairs):
    best = best_threshold(*arrays(pairs))
    assert best == twin_of_best_threshold(pairs)
    everywhere = [-1.0, math.nextafter(1, 2)] + [similarity for similarity, _ in pairs]
    assert judged_right(pairs, best) == max(judged_right(pairs, threshold) for threshold in everywhere)


@given(pairs=BOTH_KINDS, data=st.data())
def test_folds_agree_with_loops(pairs, data):
    folds = data.draw(st.integers(2, min(10, len(pairs))))
    result = verify_similarities(*arrays(pairs), folds=folds)
    expected = twin_of_folds(pairs, folds)
    accuracies = [accuracy for accuracy, _ in expected]
    assert result.accuracy_K.tolist() == accuracies
    assert result.accuracy == pytest.approx(sum(accuracies) / folds)
    variance = sum((accuracy - result.accuracy) ** 2 for accuracy in accuracies) / folds
    assert result.accuracy_std == pytest.approx(variance**0.5, abs=1e-7)
    assert result.threshold == pytest.approx(sum(threshold for _, threshold in expected) / folds)
    rights = [(s >= t) == same for (s, same), t in zip(pairs, result.threshold_P.tolist(), strict=True)]
    assert result.correct.tolist() == rights
    assert set(result.threshold_P.tolist()) == {threshold for _, threshold in expected}


@given(pairs=BOTH_KINDS)
def test_the_roc_and_its_area_agree_with_counting(pairs):
    result = verify_similarities(*arrays(pairs), folds=2)
    found = list(zip(result.far_R.tolist(), result.tar_R.tolist(), strict=True))
    every = twin_of_roc(pairs)
    assert set(found) <= set(every)
    for far, tar in set(every) - set(found):
        assert any(
            left[1] == right[1] == tar and left[0] < far < right[0]
            for left, right in itertools.pairwise(found)
        )
    assert result.auc == pytest.approx(twin_of_auc(pairs))


@given(pairs=BOTH_KINDS)
def test_the_equal_error_rate_lies_on_the_roc(pairs):
    result = verify_similarities(*arrays(pairs), folds=2)
    on_the_way = []
    points = twin_of_roc(pairs)
    for (far, tar), (next_far, next_tar) in itertools.pairwise(points):
        before, after = far + tar - 1, next_far + next_tar - 1
        if before < 0 <= after:
            on_the_way.append(far - before / (after - before) * (next_far - far))
    assert [result.eer] == pytest.approx(on_the_way)


@given(pairs=BOTH_KINDS, fars=st.lists(st.sampled_from([1.0, 0.5, 1 / 3, 0.1, 0.07, 1e-3]), unique=True))
def test_tar_at_far_agrees_with_counting(pairs, fars):
    impostors = sum(not same for _, same in pairs)
    expected = {
        f"tar_at_far_{far:g}": max(tar for point_far, tar in twin_of_roc(pairs) if point_far <= far + 1e-9)
        for far in fars
        if impostors * far >= 1 - 1e-9
    }
    assert verify_similarities(*arrays(pairs), folds=2, fars=fars).tar_at_far == expected


def test_an_example_by_hand():
    """Fold 1: .9 g, .4 i, .7 i; fold 2: .8 g, .5 g, .1 i.

    Fold 1 is judged by .3 (between .5 and .1): the pair .7 is wrong, and so is .4.
    Fold 2 is judged by .8 (between .9 and .7), which .8 reaches and .5 does not.
    """
    similarity_P = np.array([0.9, 0.4, 0.7, 0.8, 0.5, 0.1])
    issame_P = np.array([True, False, False, True, True, False])
    result = verify_similarities(similarity_P, issame_P, folds=2, fars=(0.5, 1 / 3, 0.1))
    assert result.threshold_P.tolist() == pytest.approx([0.3] * 3 + [0.8] * 3)
    assert result.correct.tolist() == [True, False, False, True, False, True]
    assert result.accuracy_K.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert (result.accuracy, result.accuracy_std) == pytest.approx((0.5, 1 / 6))
    assert result.threshold == pytest.approx(0.55)
    assert result.far_R.tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1])
    assert result.tar_R.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert result.auc == pytest.approx(8 / 9)
    assert result.eer == pytest.approx(1 / 3)
    assert result.tar_at_far == {"tar_at_far_0.5": 1.0, "tar_at_far_0.333333": 1.0}
    assert result.genuine.tolist() == [0.9, 0.8, 0.5]
    assert result.impostor.tolist() == [0.4, 0.7, 0.1]


def test_equal_similarities_are_accepted_together():
    """All equal: the ROC is the diagonal, whatever the order, and no threshold tells the pairs apart."""
    for issame in ([True, True, False, False], [False, True, False, True]):
        far_R, tar_R = roc(np.full(2, 0.5), np.full(2, 0.5))
        assert far_R.tolist() == tar_R.tolist() == [0, 1]
        result = verify_similarities(np.full(4, 0.5), issame, folds=2)
        assert (result.auc, result.eer) == (0.5, 0.5)


def test_perfect_and_reversed_similarities():
    issame_P = np.tile([True, False], 20)
    perfect = verify_similarities(np.where(issame_P, 0.75, 0.25), issame_P)
    assert (perfect.accuracy, perfect.accuracy_std, perfect.auc, perfect.eer) == (1, 0, 1, 0)
    assert perfect.threshold == pytest.approx(0.5)
    assert perfect.tar_at_far == {"tar_at_far_0.1": 1.0}
    reverse = verify_similarities(np.where(issame_P, 0.25, 0.75), issame_P)
    assert (reverse.accuracy, reverse.auc, reverse.eer) == (0.5, 0, 1)


def test_a_far_that_needs_more_impostors_is_left_out():
    issame_P = np.tile([True, False], 1000)
    similarity_P = np.linspace(-1, 1, 2000)
    assert len(verify_similarities(similarity_P, issame_P).tar_at_far) == 3
    assert set(verify_similarities(similarity_P[2:], issame_P[2:]).tar_at_far) == {
        "tar_at_far_0.1",
        "tar_at_far_0.01",
    }


def test_a_far_that_floats_cannot_hold_allows_the_whole_number():
    """0.29 * 100 is 28.999999999999996, but means 29 false accepts of 100."""
    similarity_P = np.append(np.linspace(0.99, 0, 100), 0.705)  # 29 impostors are more similar
    issame_P = np.append(np.zeros(100, bool), True)
    assert tar_at_far(similarity_P[issame_P], similarity_P[~issame_P], (0.29, 0.28)) == {
        "tar_at_far_0.29": 1.0,
        "tar_at_far_0.28": 0.0,
    }


def test_folds_of_one_kind_only_are_judged_by_the_others():
    """Genuine first: fold 1 is judged by impostors alone, which accept nothing, and fold 2 the other way."""
    result = verify_similarities(
        np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, True, False, False]), folds=2
    )
    assert result.threshold_P.tolist() == [math.nextafter(1, 2)] * 2 + [-1.0] * 2
    assert result.accuracy == 0
    assert result.auc == 1


def test_between_neighbouring_floats_the_upper_one_is_the_threshold():
    low, high = 0.5, math.nextafter(0.5, 1)
    assert best_threshold(np.array([high, low]), np.array([True, False])) == high


def test_similarity_ignores_length_and_order_of_magnitude():
    emb_ND = np.array([[3, 4], [4, 3], [1, 0], [-2, 0], [1e-30, 1e-30], [5, 5], [1e200, 0], [1e200, 1e200]])
    expected = [24 / 25, -1, 1, 0.5**0.5]
    assert cosine_similarity(emb_ND).tolist() == pytest.approx(expected, abs=1e-12)
    assert cosine_similarity(np.full((2, 3), 6e4, np.float16)).tolist() == pytest.approx([1])
    assert (
        np.abs(cosine_similarity(np.repeat(np.random.default_rng(0).normal(size=(500, 7)), 2, 0))).max() <= 1
    )


def test_verify_judges_the_cosines_of_the_pairs():
    rng = np.random.default_rng(0)
    issame_P = rng.random(60) < 0.5
    first_PD, other_PD = rng.normal(size=(2, 60, 8))
    second_PD = np.where(issame_P[:, None], first_PD + 0.8 * other_PD, other_PD)
    emb_ND = np.stack([first_PD, second_PD], 1).reshape(120, 8) * rng.uniform(0.1, 9, (120, 1))
    result = verify(emb_ND, issame_P)
    for i, similarity in enumerate(result.similarity_P):
        a, b = emb_ND[2 * i], emb_ND[2 * i + 1]
        assert similarity == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert len(result.accuracy_K) == 10
    assert result.accuracy > 0.8
    assert result.summary() == verify_similarities(result.similarity_P, issame_P).summary()


def test_the_summary_is_plain_json():
    result = verify_similarities(
        np.array([0.9, 0.3, 0.7, 0.1] * 5), np.array([True, False] * 10), fars=(0.1,)
    )
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary == {
        "accuracy": 1.0,
        "accuracy_std": 0.0,
        "threshold": 0.5,
        "auc": 1.0,
        "eer": 0.0,
        "tar_at_far_0.1": 1.0,
    }


@pytest.mark.parametrize(
    ("row", "value", "complaint"),
    [
        (5, 0.0, "found 1 of 40 .* of image 5, has only zeros"),
        (8, np.nan, "found 1 of 40 .* of image 8, has NaN or infinity"),
        (slice(3, 7), np.inf, "found 4 of 40 .* of image 3, has NaN or infinity"),
    ],
)
def test_an_embedding_without_direction_is_named(row, value, complaint):
    emb_ND = np.ones((40, 3))
    emb_ND[row] = value
    with pytest.raises(ValueError, match=complaint):
        verify(emb_ND, np.tile([True, False], 10))


@pytest.mark.parametrize(
    ("similarity", "issame", "folds", "complaint"),
    [
        ([0.1] * 9, [True, False, True] * 3, 10, "found 9 pairs and 10 folds"),
        ([0.1] * 4, [True, False] * 2, 1, "as many pairs as folds, found 4 pairs and 1 folds"),
        ([], [], 10, "found 0 pairs and 10 folds"),
        ([0.1] * 4, [True] * 3, 2, r"shapes \(4,\) for pairs and \(3,\) for booleans"),
        ([[0.1, 0.2]], [[True, False]], 2, r"shapes \(1, 2\)"),
        ([0.1] * 4, [True] * 4, 2, "found 4 and 0; add pairs of the other kind"),
        ([0.1] * 4, [False] * 4, 2, "found 0 and 4"),
        ([0.1, 0.2, 1.5, 0.3], [True, False] * 2, 2, "from -1 to 1, found 1.5 for pair 2"),
        ([0.1, np.nan, 0.2, 0.3], [True, False] * 2, 2, "found nan for pair 1"),
    ],
)
def test_pairs_that_cannot_be_judged_are_refused(similarity, issame, folds, complaint):
    with pytest.raises(ValueError, match=complaint):
        verify_similarities(np.array(similarity), np.array(issame), folds=folds)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 2, 2)])
def test_embeddings_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected two embeddings for each pair, \[2P, D\], found shape"):
        cosine_similarity(np.ones(shape))


def test_known_answer_by_hand():
    genuine, impostor = np.array([0.9, 0.8, 0.3, 0.2]), np.array([0.85, 0.5, 0.25, 0.1, 0.0])
    # One of five impostors may be accepted: pairs above 0.5 are accepted.
    assert threshold_at(impostor, 0.2) == math.nextafter(0.5, 1)
    figures = tar_at_far(genuine, impostor, (0.2, 0.4, 0.1))
    assert figures == {"tar_at_far_0.2": 0.5, "tar_at_far_0.4": 0.75}
    far, tar = roc(genuine, impostor)
    np.testing.assert_allclose(far, [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 1])
    np.testing.assert_allclose(tar, [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1])


def test_too_few_impostors_tell_nothing_about_a_rate():
    assert threshold_at(np.zeros(9), 0.1) is None
    assert threshold_at(np.arange(10.0), 0.1) == math.nextafter(8, 9)
    assert threshold_at(np.arange(10.0), 1.0) == -math.inf


def test_the_most_similar_impostors_alone_give_the_same_threshold():
    impostor = np.random.default_rng(0).random(1000).astype(np.float32)
    kept = np.sort(impostor)[-50:]
    assert threshold_at(kept, 0.02, impostors=1000) == threshold_at(impostor, 0.02)
    assert (impostor >= threshold_at(impostor, 0.02)).sum() == 20


def test_histogram_counts_every_pair_once():
    counts = histogram(np.array([1.0000001, 0.005, -1.0]), np.array([0.0049, 0.0051]))
    assert counts.genuine_B.sum() == 3
    assert counts.genuine_B[[-1, 100, 0]].tolist() == [1, 1, 1]
    assert counts.impostor_B[100] == 2
    assert counts.edge_B1[[0, 100, 200]].tolist() == [-1, 0, 1]


def test_rejecting_the_worst_pairs_takes_the_errors_that_they_make():
    impostor = np.linspace(0, 0.5, 1001)
    # The threshold is the second largest impostor; only a larger similarity is accepted.
    genuine = np.array([0.1, 0.9, impostor[-2], 0.9, 0.9])
    quality = np.array([1.0, 9.0, 2.0, 3.0, 3.0])
    curve = rejection(genuine, quality, impostor, 1e-3)
    np.testing.assert_allclose(curve.rejected_R, [0, 0.2, 0.4, 0.8])
    np.testing.assert_allclose(curve.fnmr_R, [0.4, 0.25, 0, 0])
    assert curve.fmr == 1e-3
    assert rejection(genuine, quality, impostor[:100], 1e-3) is None


def test_rejection_equals_a_plain_loop_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    genuine, quality, impostor = rng.random(1000), rng.integers(0, 300, 1000), rng.random(2000)
    curve = rejection(genuine, quality, impostor, 0.01)
    least = np.sort(impostor)[-21]
    assert 50 < len(curve.rejected_R) <= 100
    for rejected, fnmr in zip(curve.rejected_R, curve.fnmr_R, strict=True):
        worst = np.sort(quality)[round(rejected * 1000)]
        assert (quality < worst).mean() == pytest.approx(rejected)
        assert (genuine[quality >= worst] <= least).mean() == pytest.approx(fnmr)
    order = rng.permutation(1000)
    shuffled = rejection(genuine[order], quality[order], impostor, 0.01)
    np.testing.assert_array_equal(shuffled.fnmr_R, curve.fnmr_R)
