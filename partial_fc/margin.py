"""Margins: the cosine to the target class -> its logit before scaling, and the derivative in closed form.

A margin is one small class with `target`. Its derivative is written out because the streamed softmax
does without autograd; tests hold it against float64 autograd over all cosines.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from partial_fc.config import MarginConfig


class Margin(Protocol):
    """What the softmax asks of a margin. Any shape; cosines may leave [-1, 1] by rounding."""

    def target(self, cos_G: Tensor) -> tuple[Tensor, Tensor]:
        """The target's logit over scale, and its derivative by the cosine."""
        ...


class CosFace:
    """cos(theta) - m. Source: Wang et al., "CosFace", CVPR 2018, eq. 4."""

    def __init__(self, m: float) -> None:
        self.m = m

    def target(self, cos_G: Tensor) -> tuple[Tensor, Tensor]:
        return cos_G - self.m, torch.ones_like(cos_G)


class ArcFace:
    """cos(theta + m), continued so that it falls with theta up to theta = pi.

    Beyond theta + m = pi, cos(theta + m) would rise again and pull hard samples away from their class.
    There the logit goes on as -2 - cos(theta + m), the continuation of SphereFace: equal in value and slope
    at the seam, and steep enough that the hardest samples learn. The slope by the cosine,
    |sin(theta + m)| / sin(theta), has poles at cosines of 1 and -1; within `NEAR_POLE` of them (and beyond,
    where rounding leads) the logit is its own tangent, so value and derivative stay finite and agree.
    Sources: Deng et al., "ArcFace", CVPR 2019, eq. 3; Liu et al., "SphereFace", CVPR 2017, eq. 7.
    """

    NEAR_POLE = 1e-6

    def __init__(self, m: float) -> None:
        self.cos_m, self.sin_m = math.cos(m), math.sin(m)

    def target(self, cos_G: Tensor) -> tuple[Tensor, Tensor]:
        inner_G = cos_G.clamp(self.NEAR_POLE - 1, 1 - self.NEAR_POLE)
        sin_G = ((1 - inner_G) * (1 + inner_G)).sqrt()
        moved_cos_G = inner_G * self.cos_m - sin_G * self.sin_m
        moved_sin_G = sin_G * self.cos_m + inner_G * self.sin_m
        slope_G = moved_sin_G.abs() / sin_G
        logit_G = torch.where(moved_sin_G >= 0, moved_cos_G, -2 - moved_cos_G)
        return logit_G + slope_G * (cos_G - inner_G), slope_G


_MARGINS: dict[str, type[ArcFace] | type[CosFace]] = {"arcface": ArcFace, "cosface": CosFace}


def build(config: MarginConfig) -> Margin:
    """The margin that the configuration names."""
    return _MARGINS[config.kind](config.m)
