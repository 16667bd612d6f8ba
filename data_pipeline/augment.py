"""Augmentation parameters of sample p, as a pure function of (seed, p); `decode` applies them to the pixels.

Every augmentation has its own random numbers, so that switching one on does not affect the others. Sizes and
positions are shares of the image's height and width.

Crop, low resolution and photometric follow AdaFace (Kim et al., "AdaFace: quality adaptive margin for face
recognition", CVPR 2022), which applies each of the three to a fifth of the samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import philox
from data_pipeline.config import (
    AugmentConfig,
    BlurConfig,
    CropConfig,
    JpegConfig,
    LowResolutionConfig,
    MotionBlurConfig,
    OcclusionConfig,
    PhotometricConfig,
)

_STREAM = 2
# DALI numbers nearest, linear, cubic, Lanczos and triangular from 0; triangular averages when scaling down.
_INTERPOLATIONS = 5

Parameters = dict[str, np.ndarray]
_Numbers = Iterator[np.ndarray]


class Augmentation(NamedTuple):
    """One row per sample: mirror int32 (0 or 1), and the parameters of every augmentation that the
    configuration switches on, by its key and in order; `on` (bool) marks the samples that are changed."""

    mirror_B: np.ndarray
    changes: dict[str, Parameters]

    def rows(self, rows: slice) -> Augmentation:
        """Return the augmentation of some of the samples."""
        changes = {
            name: {key: value[rows] for key, value in parameters.items()}
            for name, parameters in self.changes.items()
        }
        return Augmentation(self.mirror_B[rows], changes)


def of_samples(config: AugmentConfig, seed: int, sample_B: np.ndarray) -> Augmentation:
    """Return the augmentation of the samples at positions `sample_B` (int64) of the run's sequence."""
    flip_B = philox.uniform(seed, sample_B, _STREAM)[0]
    changes = {}
    for number, (name, draw) in enumerate(_DRAWS.items()):
        change = getattr(config, name)
        if change.probability:
            numbers = _numbers(seed, sample_B, number)
            changes[name] = {"on": next(numbers) < change.probability, **draw(change, numbers)}
    return Augmentation((flip_B < config.flip_probability).astype(np.int32), changes)


def none(count: int) -> Augmentation:
    """Return the augmentation that leaves `count` images unchanged."""
    return Augmentation(np.zeros(count, np.int32), {})


def _numbers(seed: int, sample_B: np.ndarray, change: int) -> _Numbers:
    """Yield random float64 [B] in [0, 1) without end, for augmentation number `change`."""
    for part in itertools.count():
        yield from philox.uniform(seed, sample_B, _STREAM << 32 | change << 8 | part)


def _occlusion(config: OcclusionConfig, numbers: _Numbers) -> Parameters:
    top_B, left_B, height_B, width_B = _rectangle(config, numbers)
    colour = [np.floor(256 * next(numbers)) for _ in range(3)]
    return {"anchor": _rows(top_B, left_B), "shape": _rows(height_B, width_B), "fill": _rows(*colour)}


def _crop(config: CropConfig, numbers: _Numbers) -> Parameters:
    """Return the black strips above, below, left and right of a rectangle. The strips below and right end
    beyond the image, so that rounding leaves no line at its edge."""
    top_B, left_B, height_B, width_B = _rectangle(config, numbers)
    bottom_B, right_B, zero_B, one_B = top_B + height_B, left_B + width_B, 0 * top_B, 0 * top_B + 1
    return {
        "anchor": _rows(zero_B, zero_B, bottom_B, zero_B, zero_B, zero_B, zero_B, right_B),
        "shape": _rows(top_B, one_B, one_B, one_B, one_B, left_B, one_B, one_B),
    }


def _motion_blur(config: MotionBlurConfig, numbers: _Numbers) -> Parameters:
    """Return a kernel [K, K] per sample, K odd and the same for all: a central line, one pixel wide."""
    reach = math.ceil((config.length[1] - 1) / 2)
    y_K1, x_1K = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    half_B11 = _between(config.length, next(numbers))[:, None, None] / 2
    angle_B11 = math.pi * next(numbers)[:, None, None]
    sin_B11, cos_B11 = np.sin(angle_B11), np.cos(angle_B11)
    along_BKK, across_BKK = x_1K * cos_B11 + y_K1 * sin_B11, y_K1 * cos_B11 - x_1K * sin_B11
    # The weight of a pixel is the share of it that the line covers.
    kernel_BKK = np.clip(half_B11 + 0.5 - abs(along_BKK), 0, 1) * np.clip(1 - abs(across_BKK), 0, 1)
    return {"kernel": (kernel_BKK / kernel_BKK.sum((1, 2), keepdims=True)).astype(np.float32)}


def _blur(config: BlurConfig, numbers: _Numbers) -> Parameters:
    return {"sigma": _between(config.sigma, next(numbers)).astype(np.float32)}


def _low_resolution(config: LowResolutionConfig, numbers: _Numbers) -> Parameters:
    return {
        "scale": _between(config.scale, next(numbers)).astype(np.float32),
        "down": (_INTERPOLATIONS * next(numbers)).astype(np.int32),
        "up": (_INTERPOLATIONS * next(numbers)).astype(np.int32),
    }


def _photometric(config: PhotometricConfig, numbers: _Numbers) -> Parameters:
    """Return factors of brightness, contrast and saturation (1 is unchanged) and the hue angle in degrees."""
    centres_and_widths = {
        "brightness": (1, config.brightness),
        "contrast": (1, config.contrast),
        "saturation": (1, config.saturation),
        "hue": (0, config.hue),
    }
    return {
        name: _between((centre - width, centre + width), next(numbers)).astype(np.float32)
        for name, (centre, width) in centres_and_widths.items()
    }


def _grey(_config: object, _numbers: _Numbers) -> Parameters:
    return {}


def _jpeg(config: JpegConfig, numbers: _Numbers) -> Parameters:
    lowest, highest = config.quality
    return {"quality": np.floor(_between((lowest, highest + 1), next(numbers))).astype(np.int32)}


_DRAWS: dict[str, Callable[[Any, _Numbers], Parameters]] = {
    "occlusion": _occlusion,
    "crop": _crop,
    "motion_blur": _motion_blur,
    "blur": _blur,
    "low_resolution": _low_resolution,
    "photometric": _photometric,
    "grey": _grey,
    "jpeg": _jpeg,
}


def _rectangle(config: CropConfig | OcclusionConfig, numbers: _Numbers) -> tuple[np.ndarray, ...]:
    """Return top, left, height and width of a rectangle in the image, of random area, aspect and position."""
    area_B = _between(config.area, next(numbers))
    low, high = config.aspect
    aspect_B = np.exp(_between((math.log(low), math.log(high)), next(numbers)))
    height_B = np.minimum(np.sqrt(area_B / aspect_B), 1)
    width_B = np.minimum(np.sqrt(area_B * aspect_B), 1)
    return next(numbers) * (1 - height_B), next(numbers) * (1 - width_B), height_B, width_B


def _between(ends: tuple[float, float], number_B: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * number_B


def _rows(*columns: np.ndarray) -> np.ndarray:
    return np.stack(columns, axis=1).astype(np.float32)
