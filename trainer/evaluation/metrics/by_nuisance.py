"""Accuracy on a synthetic verification set, split by the nuisances of its images.

A synthetic set has a table of every image's nuisances. For each nuisance, the pairs are ordered by the harder
of their two images and divided into thirds. For occlusion, which has kinds instead of a degree, they are
divided by the number of occluded images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.evaluation.metrics.verification import VerificationResult

Split = list[tuple[str, float, int]]

# Larger is harder.
_HARDNESS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "turn of the head": lambda nuisance_N: np.abs(nuisance_N["yaw_deg"]),
    "deformation": lambda nuisance_N: nuisance_N["warp"],
    "too dark or too bright": lambda nuisance_N: np.abs(nuisance_N["exposure_stops"]),
    "blur": lambda nuisance_N: nuisance_N["blur_px"],
    "low resolution": lambda nuisance_N: -nuisance_N["resolution"],
    "compression": lambda nuisance_N: -nuisance_N["jpeg_quality"],
}
_THIRDS = ("least", "middle", "most")
_OCCLUDED = ("neither image", "one image", "both images")


def by_nuisance(result: VerificationResult, nuisance_2P: np.ndarray) -> dict[str, Split]:
    """Return (label, accuracy, number of pairs) of the parts of the set, for each nuisance.

    nuisance_2P: one record per image, those of pair i at 2i and 2i + 1, with the fields of
    `data_pipeline.synthetic.dataset.read_nuisances`. Raises ValueError if the number of records is wrong.
    """
    pairs = len(result.issame_P)
    if len(nuisance_2P) != 2 * pairs:
        raise ValueError(f"expected the nuisances of {2 * pairs} images, found those of {len(nuisance_2P)}")
    splits = {}
    for name, hardness in _HARDNESS.items():
        order_P = np.argsort(hardness(nuisance_2P).reshape(pairs, 2).max(1), kind="stable")
        splits[name] = [
            _part(result, f"{label} third", part)
            for label, part in zip(_THIRDS, np.array_split(order_P, 3), strict=True)
        ]
    occluded_P = (nuisance_2P["occlusion"] != "none").reshape(pairs, 2).sum(1)
    splits["occlusion"] = [
        _part(result, label, np.flatnonzero(occluded_P == count))
        for count, label in enumerate(_OCCLUDED)
        if (occluded_P == count).any()
    ]
    return splits


def _part(result: VerificationResult, label: str, chosen: np.ndarray) -> tuple[str, float, int]:
    return label, float(result.correct[chosen].mean()), len(chosen)
