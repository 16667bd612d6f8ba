"""Optimizers of class rows, each with its configuration: an update changes the given rows and no others.

A row that a step does not sample keeps its weight and moments, without weight decay. `state` holds the
moments under their names in a checkpoint. They are computed in the weight's dtype and stored in the
configured one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

Rows = slice | Tensor

# bfloat16 has 8 significant bits: rounding undoes a decay by less than this share of the value.
_BF16_LEAST_DECAY = 2**-7


class RowOptimizer(Protocol):
    """Interface of the optimizers of class rows."""

    state: dict[str, Tensor]

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        """Update the rows `rows` in place by their gradient [T, D], which may be overwritten."""
        ...


class RowOptimizerConfig(BaseModel):
    """The keys that all optimizers of class rows have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="weight decay of the class rows that a step samples: sgd adds this times a row to its "
        "gradient, adamw subtracts this times the learning rate times the row",
    )
    moments: Literal["fp32", "bf16"] = Field(
        "fp32", description="type in which the moments are stored; bf16 takes half the memory"
    )

    def build(self, weight_RD: Tensor) -> RowOptimizer:
        """Return the optimizer of `weight_RD`; with moments = fp32 they have the weight's dtype."""
        raise NotImplementedError

    def zero_moment(self, weight_RD: Tensor) -> Tensor:
        return torch.zeros_like(weight_RD, dtype=torch.bfloat16 if self.moments == "bf16" else None)


class RowSGDConfig(RowOptimizerConfig):
    """SGD with momentum."""

    kind: Literal["sgd"] = Field("sgd", description="SGD with momentum")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum")

    def build(self, weight_RD: Tensor) -> RowOptimizer:
        return RowSGD(self, weight_RD)


class RowSGD:
    """SGD with momentum and weight decay, as torch.optim.SGD computes it."""

    def __init__(self, config: RowSGDConfig, weight_RD: Tensor) -> None:
        self._config, self._weight_RD = config, weight_RD
        self.state = {"momentum": config.zero_moment(weight_RD)}

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        weight_TD, momentum_TD = self._weight_RD[rows], self.state["momentum"][rows]
        moved_TD = momentum_TD.to(weight_TD.dtype)
        moved_TD.mul_(self._config.momentum).add_(grad_TD)
        moved_TD.add_(weight_TD, alpha=self._config.weight_decay)
        _store(self.state["momentum"], rows, moved_TD)
        _store(self._weight_RD, rows, weight_TD.sub_(moved_TD, alpha=learning_rate))


class RowAdamWConfig(RowOptimizerConfig):
    """AdamW."""

    kind: Literal["adamw"] = Field("adamw", description="AdamW")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(
        0.999, ge=0, lt=1, description="decay of the second moment; at most 0.992 with moments = bf16"
    )

    @model_validator(mode="after")
    def _moments_can_decay(self) -> RowAdamWConfig:
        if self.moments == "bf16" and 1 - self.beta2 < _BF16_LEAST_DECAY:
            raise ValueError(
                f"moments = bf16 with beta2 = {self.beta2:g}: expected beta2 <= {1 - _BF16_LEAST_DECAY:.3g}, "
                "as bfloat16 would round smaller changes away; lower beta2, or set moments = fp32"
            )
        return self

    def build(self, weight_RD: Tensor) -> RowOptimizer:
        return RowAdamW(self, weight_RD)


class RowAdamW:
    """AdamW, as torch.optim.AdamW computes it for a parameter that is stepped only when it has a gradient.

    The bias correction uses each row's own number of updates, stored in `updates` [R, 1].
    """

    EPS = 1e-8

    def __init__(self, config: RowAdamWConfig, weight_RD: Tensor) -> None:
        self._config, self._weight_RD = config, weight_RD
        self.state = {
            "first_moment": config.zero_moment(weight_RD),
            "second_moment": config.zero_moment(weight_RD),
            "updates": torch.zeros_like(weight_RD[:, :1], dtype=torch.int32),
        }

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        beta1, beta2 = self._config.beta1, self._config.beta2
        weight_TD, updates_T1 = self._weight_RD[rows], self.state["updates"][rows].add_(1)
        first_TD = self.state["first_moment"][rows].to(weight_TD.dtype).lerp_(grad_TD, 1 - beta1)
        second_TD = self.state["second_moment"][rows].to(weight_TD.dtype).mul_(beta2)
        second_TD.addcmul_(grad_TD, grad_TD, value=1 - beta2)
        for name, moved in (
            ("first_moment", first_TD),
            ("second_moment", second_TD),
            ("updates", updates_T1),
        ):
            _store(self.state[name], rows, moved)
        bias1_T1, bias2_T1 = (
            (1 - beta ** updates_T1.double()).to(weight_TD.dtype) for beta in (beta1, beta2)
        )
        size_TD = (second_TD / bias2_T1).sqrt_().add_(self.EPS).mul_(bias1_T1)
        weight_TD.mul_(1 - learning_rate * self._config.weight_decay)
        _store(self._weight_RD, rows, weight_TD.addcdiv_(first_TD, size_TD, value=-learning_rate))


def _store(tensor_RD: Tensor, rows: Rows, value_TD: Tensor) -> None:
    """Write rows back; torch skips the copy where they are a view of the tensor."""
    tensor_RD[rows] = value_TD.to(tensor_RD.dtype)


def _with_kind(value: Any) -> Any:
    """Take a table without a `kind` as that of sgd."""
    return {"kind": "sgd", **value} if isinstance(value, dict) else value


# The configuration of either optimizer, chosen by `kind`.
AnyRowOptimizer = Annotated[
    RowSGDConfig | RowAdamWConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)
]
