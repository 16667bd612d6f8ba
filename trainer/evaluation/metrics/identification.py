"""Identification (1:N): for each probe, the number of impostors in a gallery that rank before its mates.

    probe_M, gallery_M = mates(label_P, label_G)
    search = Search(len(label_P), probe_M, similarity_M)
    for part, similarity_PC in gallery_similarity(unit_PD, emb_ND, row_G):
        search.add(np.where(label_P[:, None] == label_G[part], -np.inf, similarity_PC))
    cmc(search.first_rank(), 20), search.average_precision().mean()

The matrix of all probes and the whole gallery is never allocated. An impostor as similar as a mate ranks
before it, so that a network with equal embeddings for all images identifies no probe.

Shapes: P probes, G entries of a gallery, C of a chunk of it, M pairs of a probe and a mate.
"""

from __future__ import annotations

import numpy as np

# Similarities of the same two embeddings, summed in another order, differ by less than this.
ROUNDING = 1e-6


def mates(label_P: np.ndarray, label_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of a probe and a gallery entry of one label, int [M] each, ordered by probe."""
    order_G = np.argsort(label_G, kind="stable")
    first_P, last_P = (np.searchsorted(label_G[order_G], label_P, side) for side in ("left", "right"))
    count_P = last_P - first_P
    probe_M = np.repeat(np.arange(len(label_P)), count_P)
    nth_M = np.arange(len(probe_M)) - np.repeat(np.cumsum(count_P) - count_P, count_P)
    return probe_M, order_G[np.repeat(first_P, count_P) + nth_M]


class Search:
    """Counter of the impostors that reach each mate's similarity, over chunks of the gallery.

    Mates are sorted by probe, and those of one probe by increasing similarity. order_M: that order, as
    indices of the given pairs. probe_M: probes. similarity_M: similarities, reduced by the possible rounding
    error. before_M: numbers of impostors that reach them. best_P: the similarity of the best impostor of each
    probe, with or without mates.
    """

    def __init__(self, probes: int, probe_M: np.ndarray, similarity_M: np.ndarray) -> None:
        self.order_M = np.lexsort((similarity_M, probe_M))
        self.probe_M, self.similarity_M = probe_M[self.order_M], similarity_M[self.order_M] - ROUNDING
        self.before_M = np.zeros(len(probe_M), np.int64)
        self.best_P = np.full(probes, -np.inf, np.float32)
        self._first_P1 = np.searchsorted(self.probe_M, np.arange(probes + 1))

    def add(self, similarity_PC: np.ndarray) -> None:
        """Count impostors by their similarities to the probes; -infinity excludes an entry for a probe."""
        best_P = similarity_PC.max(axis=1)
        np.maximum(self.best_P, best_P, out=self.best_P)
        mated_P = np.flatnonzero(np.diff(self._first_P1))
        for probe in mated_P[best_P[mated_P] >= self.similarity_M[self._first_P1[mated_P]]]:
            mine = slice(self._first_P1[probe], self._first_P1[probe + 1])
            least_m = self.similarity_M[mine]
            similarity_C = similarity_PC[probe]
            # An impostor that reaches k mates reaches the k least similar ones.
            reached = np.searchsorted(least_m, similarity_C[similarity_C >= least_m[0]], side="right")
            self.before_M[mine] += np.bincount(reached, minlength=len(least_m) + 1)[:0:-1].cumsum()[::-1]

    def first_rank(self) -> np.ndarray:
        """Return the rank, from 1, of the most similar mate of each probe that has mates."""
        return 1 + self.before_M[self._last()]

    def first_similarity(self) -> np.ndarray:
        """Return the similarity of the most similar mate of each probe that has mates."""
        return self.similarity_M[self._last()]

    def average_precision(self) -> np.ndarray:
        """Return the area under precision over recall, by the trapezoidal rule, of each probe with mates.

        Precision starts at 1, as in TinyFace's own evaluation and in J. Philbin et al., Object retrieval with
        large vocabularies and fast spatial matching, CVPR 2007.
        """
        count_P = np.diff(self._first_P1)
        # The position of a mate among those of its probe: 1 for the most similar one.
        nth_M = np.repeat(self._first_P1[1:], count_P) - np.arange(len(self.probe_M))
        place_M = self.before_M + nth_M
        here_M = nth_M / place_M
        just_before_M = np.where(place_M > 1, (nth_M - 1) / np.maximum(place_M - 1, 1), 1.0)
        area_P = np.bincount(self.probe_M, (here_M + just_before_M) / 2, minlength=len(count_P))
        return area_P[count_P > 0] / count_P[count_P > 0]

    def _last(self) -> np.ndarray:
        return self._first_P1[1:][np.diff(self._first_P1) > 0] - 1


def cmc(rank_K: np.ndarray, length: int) -> np.ndarray:
    """Return the fractions, float64 [length], of searches whose rank is at most 1, 2, ..., `length`."""
    return np.bincount(np.minimum(rank_K, length + 1), minlength=length + 2)[1:-1].cumsum() / len(rank_K)
