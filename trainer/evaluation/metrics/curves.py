"""What the similarities of genuine and impostor pairs say: ROC, TAR at FAR, histogram, error versus reject.

For millions of pairs: everything here takes a sort of either kind and little more.

Shapes: G genuine pairs, I impostor pairs, R points of a curve, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.evaluation.protocol import Histogram, Rejection

_BINS = 200
_REJECTION_POINTS = 100
# Products such as 0.29 * 100 may miss a whole number by less than this.
_ROUNDING = 1e-9


def strict_threshold(impostor_I: np.ndarray, rate: float) -> float | None:
    """The similarity that at most the share `rate` of the impostors exceeds; None if they are too few.

    What is to be accepted has to exceed it, so that equal similarities are accepted or rejected together.
    """
    allowed = int(np.floor(rate * len(impostor_I) + _ROUNDING))
    if not 1 <= allowed < len(impostor_I):
        return None
    place = len(impostor_I) - 1 - allowed
    return float(np.partition(impostor_I, place)[place])


def tar_at_far(genuine_G: np.ndarray, impostor_I: np.ndarray, fars: Sequence[float]) -> dict[str, float]:
    """`tar_at_far_0.001` and so on, for each FAR that there are impostor pairs enough to measure."""
    threshold = {far: strict_threshold(impostor_I, far) for far in fars}
    return {
        f"tar_at_far_{far:g}": float((genuine_G > least).mean())
        for far, least in threshold.items()
        if least is not None
    }


def roc(genuine_G: np.ndarray, impostor_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, float64 [R] each: every corner of the curve, from (0, 0) to (1, 1).

    TAR rises at the similarities of genuine pairs only, so there are no more points than those, however many
    impostors there are. Both kinds must occur.
    """
    least_R, count_R = np.unique(genuine_G, return_counts=True)
    reaching_R = len(impostor_I) - np.searchsorted(np.sort(impostor_I), least_R)
    far_R, tar_R = reaching_R[::-1] / len(impostor_I), np.cumsum(count_R[::-1]) / len(genuine_G)
    return np.concatenate([[0.0], far_R, [1.0]]), np.concatenate([[0.0], tar_R, [1.0]])


def histogram(genuine_G: np.ndarray, impostor_I: np.ndarray) -> Histogram:
    """Counts in 200 equal bins from -1 to 1; what rounding took beyond counts at the end."""
    genuine_B, impostor_B = (
        np.histogram(np.clip(similarity, -1, 1), _BINS, (-1, 1))[0] for similarity in (genuine_G, impostor_I)
    )
    return Histogram(np.linspace(-1, 1, _BINS + 1), genuine_B, impostor_B)


def rejection(
    genuine_G: np.ndarray, quality_G: np.ndarray, impostor_I: np.ndarray, fmr: float
) -> Rejection | None:
    """Error versus reject, in at most a hundred steps; None if the impostors are too few for that `fmr`.

    `quality_G` of a pair is that of the worse of the two. Pairs of one quality are rejected together.
    """
    least = strict_threshold(impostor_I, fmr)
    if least is None:
        return None
    order_G = np.argsort(quality_G)
    quality_G, missed_G = quality_G[order_G], (genuine_G <= least)[order_G]
    whole_R = np.append(0, 1 + np.flatnonzero(quality_G[:-1] < quality_G[1:]))
    wanted = np.linspace(0, len(quality_G), _REJECTION_POINTS, endpoint=False)
    rejected_R = np.unique(whole_R[np.searchsorted(whole_R, wanted, side="right") - 1])
    missed_after_R = missed_G.sum() - np.append(0, np.cumsum(missed_G))[rejected_R]
    return Rejection(fmr, rejected_R / len(quality_G), missed_after_R / (len(quality_G) - rejected_R))
