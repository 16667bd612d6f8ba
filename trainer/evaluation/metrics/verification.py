"""Verification, as on LFW and IJB 1:1: which pairs of images or templates show one identity?

    result = verify(emb_ND, issame_P)
    result.accuracy, result.tar_at_far, result.summary()

Everywhere a pair is accepted if its similarity is at least the threshold, so that equal similarities are
accepted or rejected together. NIST's reports on face recognition count in this way, and so does
scikit-learn's `roc_curve`, which InsightFace uses. All thresholds are tried, not a fixed set of them. FAR and
FMR are the same here: no image is rejected before the comparison.

Shapes: P pairs, N = 2P images of which pair i is 2i and 2i+1, K folds, G genuine pairs, I impostor pairs,
R points of a curve, V different similarities, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.protocol import Histogram, Rejection

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_BINS = 200
_REJECTION_POINTS = 100
# The threshold that accepts every cosine, and the one that rejects every cosine.
_ACCEPT_ALL, _REJECT_ALL = -1.0, float(np.nextafter(1.0, 2.0))
# Products such as 0.29 * 100 may miss an integer by less than this.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class VerificationResult:
    """The results of verifying one set of pairs.

    `accuracy` and `accuracy_std` are the mean and the (population) standard deviation of `accuracy_K`, the
    share of correctly verified pairs in each fold; `threshold` is the mean of the folds' thresholds, and
    `threshold_P` holds for each pair the threshold of its fold. `far_R` and `tar_R` are the ROC, as `roc`
    returns it. `tar_at_far` has names such as `tar_at_far_0.001` and omits every FAR for which the set has
    too few impostor pairs.
    """

    accuracy: float
    accuracy_std: float
    threshold: float
    auc: float
    eer: float
    tar_at_far: dict[str, float]
    accuracy_K: np.ndarray
    far_R: np.ndarray
    tar_R: np.ndarray
    similarity_P: np.ndarray
    issame_P: np.ndarray
    threshold_P: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """The correctly verified pairs, as a mask bool [P]."""
        return (self.similarity_P >= self.threshold_P) == self.issame_P

    @property
    def genuine(self) -> np.ndarray:
        """Similarities of the pairs that show one identity, in the order of the set."""
        return self.similarity_P[self.issame_P]

    @property
    def impostor(self) -> np.ndarray:
        """Similarities of the pairs that show two identities, in the order of the set."""
        return self.similarity_P[~self.issame_P]

    def summary(self) -> dict[str, float]:
        """Return the figures by name as plain floats, ready for JSON."""
        names = ("accuracy", "accuracy_std", "threshold", "auc", "eer")
        return {name: getattr(self, name) for name in names} | self.tar_at_far


def verify(
    emb_ND: np.ndarray, issame_P: np.ndarray, *, folds: int = 10, fars: Sequence[float] = FARS
) -> VerificationResult:
    """Verify P pairs by the embeddings [2P, D] of their images, of any norm but zero.

    Raises ValueError as `cosine_similarity` and `verify_similarities` do.
    """
    return verify_similarities(cosine_similarity(emb_ND), issame_P, folds=folds, fars=fars)


def cosine_similarity(emb_ND: np.ndarray) -> np.ndarray:
    """Return the cosines float64 [P] of the rows 2i and 2i+1.

    Raises ValueError, naming the first image, if an embedding is zero or non-finite.
    """
    emb_ND = np.asarray(emb_ND, np.float64)
    if emb_ND.ndim != 2 or len(emb_ND) % 2:
        raise ValueError(f"expected two embeddings for each pair, [2P, D], found shape {emb_ND.shape}")
    peak_N = np.abs(emb_ND).max(axis=1, initial=0.0)
    bad_N = np.flatnonzero(~np.isfinite(peak_N) | (peak_N == 0))
    if len(bad_N):
        found = "only zeros" if peak_N[bad_N[0]] == 0 else "NaN or infinity"
        raise ValueError(
            f"expected finite embeddings other than zero, found {len(bad_N)} of {len(emb_ND)} that are not; "
            f"the first, of image {bad_N[0]}, has {found}; check that the network's weights are finite"
        )
    # Divide by the largest entry first, so that no square overflows or underflows.
    emb_ND = emb_ND / peak_N[:, None]
    emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
    return np.clip(np.einsum("pd,pd->p", emb_ND[0::2], emb_ND[1::2]), -1.0, 1.0)


def verify_similarities(
    similarity_P: np.ndarray, issame_P: np.ndarray, *, folds: int = 10, fars: Sequence[float] = FARS
) -> VerificationResult:
    """Verify P pairs by their similarities in [-1, 1], in contiguous folds.

    The threshold of a fold is the best one on all other folds. The first P % folds folds hold one pair more
    than the others. A set should mix genuine and impostor pairs throughout: in a fold of one kind the
    accuracy is its TAR or 1 - FAR, at a threshold chosen for another mixture; if all other folds are of one
    kind, the threshold accepts or rejects every pair.

    Raises ValueError if the counts differ, if there are fewer than two folds or fewer pairs than folds, if
    genuine or impostor pairs are missing, or if a similarity is outside [-1, 1].
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
    genuine_G, impostor_I = similarity_P[issame_P], similarity_P[~issame_P]
    far_R, tar_R = roc(genuine_G, impostor_I)
    return VerificationResult(
        accuracy=float(accuracy_K.mean()),
        accuracy_std=float(accuracy_K.std()),
        threshold=float(threshold_K.mean()),
        auc=float(np.trapezoid(tar_R, far_R)),
        eer=_equal_error_rate(far_R, tar_R),
        tar_at_far=tar_at_far(genuine_G, impostor_I, fars),
        accuracy_K=accuracy_K,
        far_R=far_R,
        tar_R=tar_R,
        similarity_P=similarity_P,
        issame_P=issame_P,
        threshold_P=threshold_P,
    )


def best_threshold(similarity_P: np.ndarray, issame_P: np.ndarray) -> float:
    """Return the threshold with the most correctly verified pairs; of several the strictest.

    It lies midway between two neighbouring similarities; -1 accepts all pairs, and the float after 1 none.
    """
    order_P = np.argsort(-similarity_P)
    similarity_P, issame_P = similarity_P[order_P], issame_P[order_P]
    gain_P = np.where(issame_P, 1, -1)  # by accepting one more pair
    gain = np.concatenate([[0], np.cumsum(gain_P)])
    divides = np.concatenate([[True], similarity_P[:-1] > similarity_P[1:], [True]])
    accepted = int(np.argmax(np.where(divides, gain, -1)))
    if accepted == 0:
        return _REJECT_ALL
    if accepted == len(similarity_P):
        return _ACCEPT_ALL
    above, below = similarity_P[accepted - 1], similarity_P[accepted]
    middle = below + (above - below) / 2
    # Between two adjacent floats there is none.
    return float(middle if middle > below else above)


def roc(genuine_G: np.ndarray, impostor_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return FAR and TAR, float64 [R] each, ascending from (0, 0) to (1, 1).

    The points are the corners of the curve through all thresholds, at most 2G + 2 for any number of
    impostors. Both kinds of pairs must occur.
    """
    value_V, count_V = np.unique(genuine_G, return_counts=True)
    impostor_I = np.sort(impostor_I)
    # FAR just above each genuine similarity, then at it: a tie of both kinds is a slanted segment.
    above_V = len(impostor_I) - np.searchsorted(impostor_I, value_V, side="right")
    at_V = len(impostor_I) - np.searchsorted(impostor_I, value_V, side="left")
    tar_V = np.cumsum(count_V[::-1]) / len(genuine_G)
    far_R = np.stack([above_V[::-1], at_V[::-1]], 1).ravel() / len(impostor_I)
    tar_R = np.stack([np.append(0.0, tar_V[:-1]), tar_V], 1).ravel()
    far_R, tar_R = np.concatenate([[0.0], far_R, [1.0]]), np.concatenate([[0.0], tar_R, [1.0]])
    differs_R = np.append(True, (np.diff(far_R) > 0) | (np.diff(tar_R) > 0))
    return far_R[differs_R], tar_R[differs_R]


def threshold_at(impostor_I: np.ndarray, rate: float, *, impostors: int | None = None) -> float | None:
    """Return the lowest threshold that accepts at most the share `rate` of the impostor pairs.

    impostors: their number, if `impostor_I` holds only the most similar ones. Returns None if there
    are fewer than 1 / rate impostor pairs, so that none may be accepted.
    """
    allowed = int(np.floor(rate * (impostors or len(impostor_I)) + _ROUNDING))
    if allowed < 1:
        return None
    if allowed >= len(impostor_I):
        return -np.inf
    place = len(impostor_I) - 1 - allowed
    return float(np.nextafter(np.partition(impostor_I, place)[place], np.inf))


def tar_at_far(
    genuine_G: np.ndarray, impostor_I: np.ndarray, fars: Sequence[float], *, impostors: int | None = None
) -> dict[str, float]:
    """Return the TAR at each of `fars` by name, such as `tar_at_far_0.001`; see `threshold_at`."""
    threshold = {far: threshold_at(impostor_I, far, impostors=impostors) for far in fars}
    return {
        f"tar_at_far_{far:g}": float((genuine_G >= least).mean())
        for far, least in threshold.items()
        if least is not None
    }


def histogram(genuine_G: np.ndarray, impostor_I: np.ndarray) -> Histogram:
    """Return counts in 200 equal bins from -1 to 1; values outside by rounding count in the outer bins."""
    genuine_B, impostor_B = (
        np.histogram(np.clip(similarity, -1, 1), _BINS, (-1, 1))[0] for similarity in (genuine_G, impostor_I)
    )
    return Histogram(np.linspace(-1, 1, _BINS + 1), genuine_B, impostor_B)


def rejection(
    genuine_G: np.ndarray, quality_G: np.ndarray, impostor_I: np.ndarray, fmr: float
) -> Rejection | None:
    """Return the error versus reject curve, in at most 100 points; None for too few impostors.

    quality_G: for each genuine pair, the lower quality of its two images. Pairs of equal quality are rejected
    together. fmr: the false match rate that sets the threshold.
    """
    least = threshold_at(impostor_I, fmr)
    if least is None:
        return None
    order_G = np.argsort(quality_G)
    quality_G, missed_G = quality_G[order_G], (genuine_G < least)[order_G]
    whole_R = np.append(0, 1 + np.flatnonzero(quality_G[:-1] < quality_G[1:]))
    wanted = np.linspace(0, len(quality_G), _REJECTION_POINTS, endpoint=False)
    rejected_R = np.unique(whole_R[np.searchsorted(whole_R, wanted, side="right") - 1])
    missed_after_R = missed_G.sum() - np.append(0, np.cumsum(missed_G))[rejected_R]
    return Rejection(fmr, rejected_R / len(quality_G), missed_after_R / (len(quality_G) - rejected_R))


def _check(similarity_P: np.ndarray, issame_P: np.ndarray, folds: int) -> None:
    if similarity_P.shape != issame_P.shape or similarity_P.ndim != 1:
        raise ValueError(
            f"expected one boolean for each pair, "
            f"found shapes {similarity_P.shape} for pairs and {issame_P.shape} for booleans"
        )
    if folds < 2 or len(issame_P) < folds:
        raise ValueError(
            f"expected two folds or more, and at least as many pairs as folds, "
            f"found {len(issame_P)} pairs and {folds} folds; use a larger set or other folds"
        )
    genuine = int(issame_P.sum())
    if genuine in (0, len(issame_P)):
        raise ValueError(
            f"expected genuine and impostor pairs, found {genuine} and {len(issame_P) - genuine}; "
            "add pairs of the other kind"
        )
    outside_P = np.flatnonzero(~(np.abs(similarity_P) <= 1))
    if len(outside_P):
        raise ValueError(
            f"expected similarities from -1 to 1, found {similarity_P[outside_P[0]]} for pair {outside_P[0]}"
        )


def _equal_error_rate(far_R: np.ndarray, tar_R: np.ndarray) -> float:
    """Return the FAR that equals 1 - TAR, by linear interpolation between the two nearest points."""
    excess_R = far_R + tar_R - 1
    after = int(np.argmax(excess_R >= 0))
    part = -excess_R[after - 1] / (excess_R[after] - excess_R[after - 1])
    return float(far_R[after - 1] + part * (far_R[after] - far_R[after - 1]))
