"""Margins: the logit of the target class before scaling, as a function of its cosine, and its derivatives.

    target     cosine and embedding norm of each row -> logit of its class, and both derivatives
    others     cosines of the other classes -> their logits (CurricularFace only; otherwise the cosines)
    penalty    a loss that depends on the norm only (MagFace only)
    observe    once per step: update running statistics (AdaFace, CurricularFace), which checkpoints contain

A margin is a class with its configuration before it; `AnyMargin`, at the end, contains all configurations by
`kind`. Derivatives are explicit because the streamed softmax works without autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

NEAR_POLE = 1e-6


class Target(NamedTuple):
    """The target's logit / scale and its derivatives; None if it does not depend on the norm."""

    logit_G: Tensor
    dlogit_dcos_G: Tensor
    by_norm_G: Tensor | None = None


class Margin:
    """Interface of a margin, with defaults.

    Cosines may leave [-1, 1] by rounding. state: running statistics, scalars by name.
    """

    modifies_negatives = False

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def target(self, cos_G: Tensor, norm_G: Tensor) -> Target:
        raise NotImplementedError

    def others(self, cos_GT: Tensor, target_logit_G: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits / scale of classes that are not the target, and their derivatives by the cosine.

        It is called only if `modifies_negatives`.
        """
        raise NotImplementedError

    def penalty(self, norm_G: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return a part of the loss that depends on the norm only, and its derivative; None without one."""
        return None

    def observe(self, cos_G: Tensor, norm_G: Tensor, is_counted_G: Tensor) -> None:
        """Update the running statistics by the rows of a whole step, gathered from all ranks.

        It is called at the end of a step, so that all micro-batches of a step use the same statistics. Target
        cosines are 0 unless `modifies_negatives`, because ranks exchange them only then.
        """


class MarginConfig(BaseModel):
    """The keys of a margin; a subclass defines its `kind`, adds its keys and builds the margin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str

    def build(self, device: torch.device | str) -> Margin:
        """Return the margin; its statistics are on `device`."""
        raise NotImplementedError


class CombinedConfig(MarginConfig):
    """The logit cos(m1 theta + m2) - m3 of the target."""

    kind: Literal["combined"] = Field("combined", description="margins m1, m2 and m3 together")
    m1: float = Field(1.0, ge=1, le=4, description="factor of the angle, SphereFace's margin")
    m2: float = Field(0.3, ge=0, le=2, description="added to the angle, ArcFace's margin, radians")
    m3: float = Field(0.2, ge=0, le=2, description="subtracted from the cosine, CosFace's margin")

    def build(self, device: torch.device | str) -> Margin:
        return Combined(self.m1, self.m2, self.m3)


class ArcFaceConfig(MarginConfig):
    """A margin that is added to the target's angle."""

    kind: Literal["arcface"] = Field("arcface", description="m is added to the target's angle")
    m: float = Field(0.5, ge=0, le=2, description="margin, radians")

    def build(self, device: torch.device | str) -> Margin:
        return Combined(1, self.m, 0)


class Combined(Margin):
    """cos(m1 theta + m2) - m3; (m1, m2, m3) = (1, m, 0) is ArcFace, (m, 0, 0) SphereFace.

    Source: Deng et al., "ArcFace", CVPR 2019, eq. 4.
    """

    def __init__(self, m1: float, m2: float, m3: float) -> None:
        super().__init__()
        self.m1, self.m2, self.m3 = m1, m2, m3

    def target(self, cos_G: Tensor, norm_G: Tensor) -> Target:
        moved = _moved(cos_G, self.m1, self.m2)
        return Target(moved.cos_G - self.m3, moved.dlogit_dcos_G)


class ArcFaceStraightThroughConfig(MarginConfig):
    """ArcFace's margin with InsightFace's derivative."""

    kind: Literal["arcface-straight-through"] = Field(
        "arcface-straight-through", description="arcface with a derivative of 1, as InsightFace computes it"
    )
    m: float = Field(0.5, ge=0, le=2, description="margin, radians")

    def build(self, device: torch.device | str) -> Margin:
        return ArcFaceStraightThrough(self.m)


class ArcFaceStraightThrough(Combined):
    """ArcFace's logit with a derivative of 1, as in InsightFace, which computes it outside autograd."""

    def __init__(self, m: float) -> None:
        super().__init__(1, m, 0)

    def target(self, cos_G: Tensor, norm_G: Tensor) -> Target:
        shift_G = (super().target(cos_G, norm_G).logit_G - cos_G).detach()
        return Target(cos_G + shift_G, torch.ones_like(cos_G))


class CosFaceConfig(MarginConfig):
    """A margin that is subtracted from the target's cosine."""

    kind: Literal["cosface"] = Field("cosface", description="m is subtracted from the target's cosine")
    m: float = Field(0.5, ge=0, le=2, description="margin, cosine; usually 0.35 to 0.4")

    def build(self, device: torch.device | str) -> Margin:
        return CosFace(self.m)


class CosFace(Margin):
    """cos(theta) - m. Source: Wang et al., "CosFace", CVPR 2018, eq. 4."""

    def __init__(self, m: float) -> None:
        super().__init__()
        self.m = m

    def target(self, cos_G: Tensor, norm_G: Tensor) -> Target:
        return Target(cos_G - self.m, torch.ones_like(cos_G))


class AdaFaceConfig(MarginConfig):
    """A margin on angle and cosine that depends on the embedding's norm."""

    kind: Literal["adaface"] = Field("adaface", description="a margin that depends on the embedding's norm")
    m: float = Field(0.5, ge=0, le=2, description="margin, radians and cosine; usually 0.4")
    h: float = Field(0.333, ge=0, description="change of the margin, in m, per standard deviation of norm")
    momentum: float = Field(
        0.01, gt=0, le=1, description="weight of the newest step in the running statistics of the norms"
    )

    def build(self, device: torch.device | str) -> Margin:
        return AdaFace(self.m, self.h, self.momentum, device)


class AdaFace(Margin):
    """cos(theta - m q) - m (1 + q), where the quality q in [-1, 1] is the standardised norm of the embedding.

    No gradient reaches the norm. Negative angles, which easy samples of high quality can have, count as 0.
    Before the first step the norms have mean 20 and standard deviation 100, as in the authors' code.
    Source: Kim et al., "AdaFace", CVPR 2022, eqs. 13 to 15.
    """

    NORMS = (1e-3, 100.0)
    SMALL = 1e-3

    def __init__(self, m: float, h: float, momentum: float, device: torch.device | str) -> None:
        super().__init__()
        self.m, self.h, self.momentum = m, h, momentum
        self.state = {"norm_mean": _scalar(20.0, device), "norm_std": _scalar(100.0, device)}

    def target(self, cos_G: Tensor, norm_G: Tensor) -> Target:
        mean, std = self.state["norm_mean"], self.state["norm_std"]
        quality_G = (norm_G.detach().clamp(*self.NORMS) - mean) / (std + self.SMALL)
        quality_G = (quality_G * self.h).clamp(-1, 1).to(cos_G.dtype)
        moved = _moved(cos_G, 1, -self.m * quality_G)
        return Target(moved.cos_G - self.m * (1 + quality_G), moved.dlogit_dcos_G)

    def observe(self, cos_G: Tensor, norm_G: Tensor, is_counted_G: Tensor) -> None:
        norm_G = norm_G.double().clamp(*self.NORMS)
        count = is_counted_G.sum()
        mean = (norm_G * is_counted_G).sum() / count
        variance = ((norm_G - mean).square() * is_counted_G).sum() / (count - 1)
        # A single row has no standard deviation, so that such a step is not counted.
        share = self.momentum * (count > 1)
        _follow(self.state["norm_mean"], mean, share)
        _follow(self.state["norm_std"], variance.sqrt(), share)


class MagFaceConfig(MarginConfig):
    """A margin that grows linearly with the embedding's norm, and a regulariser that raises norms."""

    kind: Literal["magface"] = Field("magface", description="an angle that grows with the embedding's norm")
    norm_low: float = Field(10.0, gt=0, description="norm up to which the margin is m_low")
    norm_high: float = Field(110.0, gt=0, description="norm from which on the margin is m_high")
    m_low: float = Field(0.45, ge=0, le=2, description="margin of the lowest quality, radians")
    m_high: float = Field(0.8, ge=0, le=2, description="margin of the highest quality, radians")
    regulariser: float = Field(35.0, ge=0, description="weight of the regulariser of the norms in the loss")

    @model_validator(mode="after")
    def _norms_rise(self) -> MagFaceConfig:
        if self.norm_low >= self.norm_high:
            raise ValueError(
                f"expected norm_low below norm_high, found {self.norm_low:g} and {self.norm_high:g}"
            )
        return self

    def build(self, device: torch.device | str) -> Margin:
        return MagFace(self)


class MagFace(Margin):
    """cos(theta + m(a)): the margin m grows with the norm a, and a regulariser raises norms.

    Between norm_low and norm_high, m is a straight line from m_low to m_high and the regulariser is
    weight (a / norm_high^2 + 1 / a); outside, both are constant, so that no gradient reaches the norm.
    Source: Meng et al., "MagFace", CVPR 2021, eqs. 5 and 6, section 3.3.
    """

    def __init__(self, config: MagFaceConfig) -> None:
        super().__init__()
        self.low, self.high, self.m_low = config.norm_low, config.norm_high, config.m_low
        self.rise = (config.m_high - config.m_low) / (config.norm_high - config.norm_low)
        self.weight = config.regulariser

    def target(self, cos_G: Tensor, norm_G: Tensor) -> Target:
        moved = _moved(cos_G, 1, self.m_low + self.rise * (norm_G.clamp(self.low, self.high) - self.low))
        return Target(
            moved.cos_G, moved.dlogit_dcos_G, moved.by_shift_G * self.rise * self._is_inside(norm_G)
        )

    def penalty(self, norm_G: Tensor) -> tuple[Tensor, Tensor]:
        inside_G = norm_G.clamp(self.low, self.high)
        by_norm_G = (self.high**-2 - inside_G**-2) * self._is_inside(norm_G)
        return self.weight * (inside_G / self.high**2 + 1 / inside_G), self.weight * by_norm_G

    def _is_inside(self, norm_G: Tensor) -> Tensor:
        return (norm_G >= self.low) & (norm_G <= self.high)


class CurricularFaceConfig(MarginConfig):
    """ArcFace's margin, with a weight of hard negatives that grows as the network improves."""

    kind: Literal["curricularface"] = Field("curricularface", description="arcface with harder negatives")
    m: float = Field(0.5, ge=0, le=2, description="margin, radians")
    momentum: float = Field(
        0.01, gt=0, le=1, description="weight of the newest step in the running mean of the target's cosine"
    )

    def build(self, device: torch.device | str) -> Margin:
        return CurricularFace(self.m, self.momentum, device)


class CurricularFace(Combined):
    """ArcFace with modified hard negatives: a cosine above the target's logit becomes cos (t + cos).

    t is the running mean of the target's cosine, 0 at the start, so that hard negatives gain weight during
    training.
    Source: Huang et al., "CurricularFace", CVPR 2020, eqs. 4 to 7.
    """

    modifies_negatives = True

    def __init__(self, m: float, momentum: float, device: torch.device | str) -> None:
        super().__init__(1, m, 0)
        self.momentum = momentum
        self.state = {"t": _scalar(0.0, device)}

    def others(self, cos_GT: Tensor, target_logit_G: Tensor) -> tuple[Tensor, Tensor]:
        is_hard_GT = cos_GT > target_logit_G[:, None]
        t = self.state["t"]
        logit_GT = torch.where(is_hard_GT, cos_GT * (t + cos_GT), cos_GT)
        return logit_GT, torch.where(is_hard_GT, t + 2 * cos_GT, 1).to(cos_GT.dtype)

    def observe(self, cos_G: Tensor, norm_G: Tensor, is_counted_G: Tensor) -> None:
        count = is_counted_G.sum()
        mean = (cos_G.double() * is_counted_G).sum() / count
        _follow(self.state["t"], mean, self.momentum * (count > 0))


class _Moved(NamedTuple):
    cos_G: Tensor
    dlogit_dcos_G: Tensor
    by_shift_G: Tensor


def _moved(cos_G: Tensor, factor: float, shift: Tensor | float) -> _Moved:
    """Return cos(phi) of the angle phi = factor theta + shift, continued so that it decreases with theta.

    Beyond phi = pi the cosine would increase again and move hard samples away from their class. There it is
    continued as SphereFace's (-1)^k cos(phi) - 2 k, k = floor(phi / pi), which is continuous in value and
    slope. A negative phi counts as 0. The derivative by the cosine, factor |sin(phi)| / sin(theta), has poles
    at cosines of 1 and -1; within `NEAR_POLE` of them and beyond, the function is replaced by its tangent, so
    that value and derivative are finite and consistent.
    Source: Liu et al., "SphereFace", CVPR 2017, eq. 7.
    """
    inner_G = cos_G.clamp(NEAR_POLE - 1, 1 - NEAR_POLE)
    phi_G = (factor * inner_G.acos() + shift).clamp(min=0)
    turns_G = (phi_G / math.pi).floor()
    sign_G = 1 - 2 * (turns_G % 2)
    fall_G = phi_G.sin().abs()
    slope_G = factor * fall_G / ((1 - inner_G) * (1 + inner_G)).sqrt()
    value_G = sign_G * phi_G.cos() - 2 * turns_G
    return _Moved(value_G + slope_G.detach() * (cos_G - inner_G), slope_G, -fall_G)


def _scalar(value: float, device: torch.device | str) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def _follow(running: Tensor, newest: Tensor, share: Tensor) -> None:
    """Update a running mean in place; with a share of 0 it stays unchanged, even if `newest` is NaN."""
    running.copy_(torch.where(share > 0, running + share * (newest - running), running))


def _with_kind(value: Any) -> Any:
    """Set kind = arcface in a table without a `kind`."""
    return {"kind": "arcface", **value} if isinstance(value, dict) else value


if TYPE_CHECKING:
    AnyMargin = MarginConfig
else:
    # Every margin's configuration, chosen by `kind`.
    AnyMargin = Annotated[
        Union[tuple(MarginConfig.__subclasses__())],  # noqa: UP007
        Field(discriminator="kind"),
        BeforeValidator(_with_kind),
    ]
