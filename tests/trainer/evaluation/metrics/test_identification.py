"""Searches counted chunk by chunk: known answers by hand, and sorting the whole matrix as a twin."""

import numpy as np
import pytest

from trainer.evaluation.metrics import similarity
from trainer.evaluation.metrics.identification import Search, cmc, mates


def search_all(unit_PD, label_P, emb_GD, label_G):
    probe_M, mate_M = mates(label_P, label_G)
    both = np.concatenate([unit_PD, similarity.unit_rows(emb_GD)])
    search = Search(len(label_P), probe_M, similarity.pair_similarity(both, probe_M, len(label_P) + mate_M))
    for part, similarity_PC in similarity.gallery_similarity(unit_PD, emb_GD, np.arange(len(emb_GD))):
        similarity_PC[label_P[:, None] == label_G[part]] = -np.inf
        search.add(similarity_PC)
    return search


def sorted_twin(similarity_PG, label_P, label_G):
    """First rank, average precision and best impostor of each probe, from a sort of its whole row."""
    found = []
    for row, label in zip(similarity_PG, label_P, strict=True):
        is_mate = (label_G == label)[np.argsort(-row)]
        places = 1 + np.flatnonzero(is_mate)
        old_precision, area = 1.0, 0.0
        for place in range(1, len(row) + 1):
            precision = is_mate[:place].sum() / place
            if is_mate[place - 1]:
                area += (old_precision + precision) / 2 / len(places)
            old_precision = precision
        found.append((places[0] if len(places) else 0, area, row[label_G != label].max()))
    return (np.array(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("held", [1 << 25, 300])
def test_equals_sorting_the_whole_matrix_whatever_the_chunks(held, monkeypatch):
    monkeypatch.setattr(similarity, "_SIMILARITIES", held)
    rng = np.random.default_rng(0)
    label_P, label_G = rng.integers(0, 12, 40), rng.integers(0, 9, 200)
    centre = rng.normal(size=(12, 16))
    unit_PD = similarity.unit_rows(centre[label_P] + rng.normal(size=(40, 16)))
    emb_GD = (3 * centre[label_G] + 3 * rng.normal(size=(200, 16))).astype(np.float32)
    search = search_all(unit_PD, label_P, emb_GD, label_G)
    rank_P, area_P, best_P = sorted_twin(unit_PD @ similarity.unit_rows(emb_GD).T, label_P, label_G)
    mated_P = rank_P > 0
    assert 0 < mated_P.sum() < 40
    np.testing.assert_array_equal(search.first_rank(), rank_P[mated_P])
    np.testing.assert_allclose(search.average_precision(), area_P[mated_P])
    np.testing.assert_allclose(search.best_P, best_P, rtol=1e-5)


def test_known_answer_by_hand():
    search = Search(2, np.array([0, 0, 1]), np.array([0.5, 0.9, 0.4], np.float32))
    search.add(np.array([[0.95, 0.7, -np.inf], [0.3, 0.2, 0.1]], np.float32))
    # Of the first probe: impostor, mate, impostor, mate. Of the second: its mate first.
    assert search.before_M.tolist() == [2, 1, 0]
    assert search.first_rank().tolist() == [2, 1]
    np.testing.assert_allclose(search.average_precision(), [(0 + 1 / 2) / 4 + (1 / 3 + 2 / 4) / 4, 1])
    np.testing.assert_allclose(search.first_similarity(), [0.9, 0.4], atol=1e-5)
    np.testing.assert_allclose(search.best_P, [0.95, 0.3])
    np.testing.assert_allclose(cmc(search.first_rank(), 3), [0.5, 1, 1])


def test_equal_embeddings_identify_no_probe():
    # Of many vectors, so that some have another cosine to themselves when it is summed in another order.
    for vector in np.random.default_rng(0).normal(size=(50, 512)):
        emb = np.tile(vector, (9, 1)).astype(np.float32)
        search = search_all(similarity.unit_rows(emb[:2]), np.arange(2), emb, np.arange(9))
        assert search.first_rank().tolist() == [9, 9]


def test_mates_are_all_pairs_of_one_label():
    probe_M, gallery_M = mates(np.array([7, 5, 9]), np.array([5, 7, 5, 4]))
    assert list(zip(probe_M.tolist(), gallery_M.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2)]


def test_rows_of_zeros_stay_and_are_similar_to_nothing():
    unit = similarity.unit_rows(np.array([[3.0, 4.0], [0, 0]]))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]])
    assert similarity.pair_similarity(unit, np.array([0, 0]), np.array([0, 1])).tolist() == pytest.approx(
        [1, 0]
    )
