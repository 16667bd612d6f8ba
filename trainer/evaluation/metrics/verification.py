"""Verification as on LFW: are two images of one person? One similarity per pair, judged by a threshold.

    result = verify(emb_ND, issame_P)
    result.accuracy, result.tar_at_far, result.summary()

A pair is accepted where its cosine similarity reaches the threshold. The pairs are cut into contiguous folds;
each fold is judged by the threshold that is best on all others. The ROC counts every threshold there is:
no grid anywhere, and equal similarities are accepted or rejected together.

Shapes: P pairs, N = 2P images of which pair i is 2i and 2i+1, K folds, R points of the ROC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# What every cosine reaches, and what none can.
_ACCEPT_ALL, _REJECT_ALL = -1.0, float(np.nextafter(1.0, 2.0))
# Products such as 0.29 * 100 may miss a whole number by less than this.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class VerificationResult:
    """What one set of pairs says about the embeddings.

    `accuracy` and `accuracy_std` are the mean and the (population) standard deviation of `accuracy_K`, the
    parts of each fold that were judged right; `threshold` is the mean of the folds' thresholds, of which
    `threshold_P` holds the one that judged each pair. `far_R` and `tar_R` rise from (0, 0) to (1, 1), one
    point for each different similarity. `tar_at_far` leaves out every FAR that the set has too few impostor
    pairs to measure.
    """

    accuracy: float
    accuracy_std: float
    threshold: float
    auc: float
    eer: float
    tar_at_far: dict[float, float]
    accuracy_K: np.ndarray
    far_R: np.ndarray
    tar_R: np.ndarray
    similarity_P: np.ndarray
    issame_P: np.ndarray
    threshold_P: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Bool [P]: which pairs were judged right."""
        return (self.similarity_P >= self.threshold_P) == self.issame_P

    @property
    def genuine(self) -> np.ndarray:
        """Similarities of the pairs that show one person, in the order of the set."""
        return self.similarity_P[self.issame_P]

    @property
    def impostor(self) -> np.ndarray:
        """Similarities of the pairs that show two persons, in the order of the set."""
        return self.similarity_P[~self.issame_P]

    def summary(self) -> dict[str, float]:
        """The figures as plain floats, ready for JSON; TAR at FAR 0.001 is `tar_at_far_0.001`."""
        figures = {
            name: getattr(self, name) for name in ("accuracy", "accuracy_std", "threshold", "auc", "eer")
        }
        return figures | {f"tar_at_far_{far:g}": tar for far, tar in self.tar_at_far.items()}


def verify(
    emb_ND: np.ndarray, issame_P: np.ndarray, *, folds: int = 10, fars: Sequence[float] = FARS
) -> VerificationResult:
    """Judge P pairs by the embeddings [2P, D] of their images, of any length but zero.

    Raises ValueError as `cosine_similarity` and `judge` do.
    """
    return judge(cosine_similarity(emb_ND), issame_P, folds=folds, fars=fars)


def cosine_similarity(emb_ND: np.ndarray) -> np.ndarray:
    """Cosines float64 [P] of the rows 2i and 2i+1.

    Raises ValueError, naming the first image, if an embedding has no direction: a zero, NaN or infinity.
    """
    emb_ND = np.asarray(emb_ND, np.float64)
    if emb_ND.ndim != 2 or len(emb_ND) % 2:
        raise ValueError(f"expected two embeddings for each pair, [2P, D], found shape {emb_ND.shape}")
    peak_N = np.abs(emb_ND).max(axis=1, initial=0.0)
    bad_N = np.flatnonzero(~np.isfinite(peak_N) | (peak_N == 0))
    if len(bad_N):
        found = "only zeros" if peak_N[bad_N[0]] == 0 else "NaN or infinity"
        raise ValueError(
            f"expected embeddings with a direction, found {found} for image {bad_N[0]} "
            f"and {len(bad_N) - 1} more of {len(emb_ND)}; check that the network's weights are finite"
        )
    # By the largest entry first, so that no square leaves the range of a float.
    emb_ND = emb_ND / peak_N[:, None]
    emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
    return np.clip(np.einsum("pd,pd->p", emb_ND[0::2], emb_ND[1::2]), -1.0, 1.0)


def judge(
    similarity_P: np.ndarray, issame_P: np.ndarray, *, folds: int = 10, fars: Sequence[float] = FARS
) -> VerificationResult:
    """Judge P pairs by their similarities in [-1, 1].

    The first P % folds folds hold one pair more than the others. A fold that holds one kind of pairs only
    still counts, with its TAR or 1 - FAR as accuracy; but its threshold was chosen among pairs mixed in
    another proportion, so a set should mix both kinds throughout. If all others hold one kind only, they
    accept everything or nothing.

    Raises ValueError if the counts differ, if there are fewer pairs than folds or fewer than two folds, if a
    kind is missing altogether, or if a similarity is outside [-1, 1].
    """
    similarity_P, issame_P = np.asarray(similarity_P, np.float64), np.asarray(issame_P).astype(bool)
    _check(similarity_P, issame_P, folds)
    fold_P = np.repeat(np.arange(folds), [len(part) for part in np.array_split(issame_P, folds)])
    threshold_K = np.array(
        [best_threshold(similarity_P[fold_P != k], issame_P[fold_P != k]) for k in range(folds)]
    )
    threshold_P = threshold_K[fold_P]
    correct_P = (similarity_P >= threshold_P) == issame_P
    accuracy_K = np.bincount(fold_P, correct_P) / np.bincount(fold_P)
    far_R, tar_R = roc(similarity_P, issame_P)
    return VerificationResult(
        accuracy=float(accuracy_K.mean()),
        accuracy_std=float(accuracy_K.std()),
        threshold=float(threshold_K.mean()),
        auc=float(np.trapezoid(tar_R, far_R)),
        eer=_equal_error_rate(far_R, tar_R),
        tar_at_far=_tar_at_far(far_R, tar_R, int((~issame_P).sum()), fars),
        accuracy_K=accuracy_K,
        far_R=far_R,
        tar_R=tar_R,
        similarity_P=similarity_P,
        issame_P=issame_P,
        threshold_P=threshold_P,
    )


def best_threshold(similarity_P: np.ndarray, issame_P: np.ndarray) -> float:
    """The threshold that judges the most pairs right; of equally good ones the strictest.

    It lies midway between two neighbouring similarities; accepting all pairs is -1, accepting none just
    above 1.
    """
    order_P = np.argsort(-similarity_P)
    similarity_P, issame_P = similarity_P[order_P], issame_P[order_P]
    gain_P = np.where(issame_P, 1, -1)  # of accepting one pair more
    gain = np.concatenate([[0], np.cumsum(gain_P)])
    divides = np.concatenate([[True], similarity_P[:-1] > similarity_P[1:], [True]])
    accepted = int(np.argmax(np.where(divides, gain, -1)))
    if accepted == 0:
        return _REJECT_ALL
    if accepted == len(similarity_P):
        return _ACCEPT_ALL
    above, below = similarity_P[accepted - 1], similarity_P[accepted]
    middle = below + (above - below) / 2
    # Between two neighbouring floats there is no middle.
    return float(middle if middle > below else above)


def roc(similarity_P: np.ndarray, issame_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, float64 [R] each, at every threshold from one that rejects all to one that accepts all.

    Both kinds of pairs must occur.
    """
    order_P = np.argsort(-similarity_P)
    similarity_P, issame_P = similarity_P[order_P], issame_P[order_P]
    last_R = np.append(np.flatnonzero(similarity_P[:-1] > similarity_P[1:]), len(similarity_P) - 1)
    tar_R = np.cumsum(issame_P)[last_R] / issame_P.sum()
    far_R = np.cumsum(~issame_P)[last_R] / (~issame_P).sum()
    return np.append(0.0, far_R), np.append(0.0, tar_R)


def _check(similarity_P: np.ndarray, issame_P: np.ndarray, folds: int) -> None:
    if similarity_P.shape != issame_P.shape or similarity_P.ndim != 1:
        raise ValueError(
            f"expected one truth for each pair, "
            f"found shapes {similarity_P.shape} for pairs and {issame_P.shape} for truths"
        )
    if folds < 2 or len(issame_P) < folds:
        raise ValueError(
            f"expected at least as many pairs as folds and two folds at least, "
            f"found {len(issame_P)} pairs and {folds} folds; use a larger set or other folds"
        )
    genuine = int(issame_P.sum())
    if genuine in (0, len(issame_P)):
        raise ValueError(
            f"expected pairs of one person and pairs of two, found {genuine} and {len(issame_P) - genuine}; "
            "a rate of errors needs both kinds"
        )
    outside_P = np.flatnonzero(~(np.abs(similarity_P) <= 1))
    if len(outside_P):
        raise ValueError(
            f"expected similarities from -1 to 1, found {similarity_P[outside_P[0]]} for pair {outside_P[0]}"
        )


def _equal_error_rate(far_R: np.ndarray, tar_R: np.ndarray) -> float:
    """Where FAR equals 1 - TAR, on the straight line between the two points of the ROC around it."""
    excess_R = far_R + tar_R - 1
    after = int(np.argmax(excess_R >= 0))
    part = -excess_R[after - 1] / (excess_R[after] - excess_R[after - 1])
    return float(far_R[after - 1] + part * (far_R[after] - far_R[after - 1]))


def _tar_at_far(
    far_R: np.ndarray, tar_R: np.ndarray, impostors: int, fars: Sequence[float]
) -> dict[float, float]:
    """The largest TAR whose FAR is at most each of `fars`, where that allows one false accept or more."""
    false_accepts_R = np.rint(far_R * impostors)
    allowed = {far: np.floor(far * impostors + _ROUNDING) for far in fars}
    return {
        far: float(tar_R[np.searchsorted(false_accepts_R, most, side="right") - 1])
        for far, most in allowed.items()
        if most >= 1
    }
