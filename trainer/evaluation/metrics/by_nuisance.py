"""Accuracy on a verification set, split by what was done to its pictures.

Painted sets come with a table of every picture's circumstances. For each of them the pairs are ordered by
the worse of their two pictures and cut into thirds; occlusions are of kinds, so there it counts how many of
the two pictures have one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.evaluation.metrics.verification import VerificationResult

Split = list[tuple[str, float, int]]

# Larger is harder.
_HARDNESS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "turn of the head": lambda picture_N: np.abs(picture_N["yaw_deg"]),
    "deformation": lambda picture_N: picture_N["warp"],
    "too dark or too bright": lambda picture_N: np.abs(picture_N["exposure_stops"]),
    "blur": lambda picture_N: picture_N["blur_px"],
    "low resolution": lambda picture_N: -picture_N["resolution"],
    "compression": lambda picture_N: -picture_N["jpeg_quality"],
}
_THIRDS = ("least", "middle", "most")
_OCCLUDED = ("neither picture", "one picture", "both pictures")


def by_nuisance(result: VerificationResult, picture_2P: np.ndarray) -> dict[str, Split]:
    """(label, accuracy, number of pairs) of the parts of the set, for each circumstance.

    `picture_2P` has one record per picture, pair i's at 2i and 2i + 1, with the fields that the painter
    writes. Raises ValueError if it is not a table of this set's pictures.
    """
    pairs = len(result.issame_P)
    if len(picture_2P) != 2 * pairs:
        raise ValueError(f"expected the circumstances of {2 * pairs} pictures, found {len(picture_2P)}")
    splits = {}
    for name, hardness in _HARDNESS.items():
        order_P = np.argsort(hardness(picture_2P).reshape(pairs, 2).max(1), kind="stable")
        splits[name] = [
            _part(result, f"{label} third", part)
            for label, part in zip(_THIRDS, np.array_split(order_P, 3), strict=True)
        ]
    occluded_P = (picture_2P["occlusion"] != "none").reshape(pairs, 2).sum(1)
    splits["occlusion"] = [
        _part(result, label, np.flatnonzero(occluded_P == count))
        for count, label in enumerate(_OCCLUDED)
        if (occluded_P == count).any()
    ]
    return splits


def _part(result: VerificationResult, label: str, chosen: np.ndarray) -> tuple[str, float, int]:
    return label, float(result.correct[chosen].mean()), len(chosen)
