"""How sample p is augmented: a pure function of (seed, p); the pixels are changed in `decode`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline import counter
from data_pipeline.config import AugmentConfig

_STREAM = 2


class Augmentation(NamedTuple):
    """One row per sample: mirror int32 (0 or 1); brightness and contrast float32 factors (1 is unchanged)."""

    mirror_B: np.ndarray
    brightness_B: np.ndarray
    contrast_B: np.ndarray


def of_samples(config: AugmentConfig, seed: int, sample_B: np.ndarray) -> Augmentation:
    """The augmentation of the samples at positions `sample_B` (int64) of the run's sequence."""
    flip_B, brightness_B, contrast_B, _ = counter.uniform(seed, sample_B, _STREAM)
    return Augmentation(
        (flip_B < config.flip_probability).astype(np.int32),
        (1 + config.brightness * (2 * brightness_B - 1)).astype(np.float32),
        (1 + config.contrast * (2 * contrast_B - 1)).astype(np.float32),
    )


def none(count: int) -> Augmentation:
    """The augmentation that leaves `count` images as they are."""
    return Augmentation(np.zeros(count, np.int32), np.ones(count, np.float32), np.ones(count, np.float32))
