"""Optimizers of class rows: an update changes the rows it is given and no others.

A row that a step does not sample keeps its weight and moments, without weight decay. `state` holds the
moments under their names in a checkpoint. They are computed in the weight's dtype and stored in the
configured one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from partial_fc.config import HeadConfig

Rows = slice | Tensor


class RowOptimizer(Protocol):
    """Interface of the optimizers of class rows."""

    state: dict[str, Tensor]

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        """Update the rows `rows` in place by their gradient [T, D], which may be overwritten."""
        ...


class RowSGD:
    """SGD with momentum and weight decay, as torch.optim.SGD computes it."""

    def __init__(
        self, weight_RD: Tensor, momentum: float, weight_decay: float, moments: torch.dtype | None = None
    ) -> None:
        self._weight_RD = weight_RD
        self._momentum = momentum
        self._weight_decay = weight_decay
        self.state = {"momentum": torch.zeros_like(weight_RD, dtype=moments)}

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        weight_TD, momentum_TD = self._weight_RD[rows], self.state["momentum"][rows]
        moved_TD = momentum_TD.to(weight_TD.dtype)
        moved_TD.mul_(self._momentum).add_(grad_TD).add_(weight_TD, alpha=self._weight_decay)
        _store(self.state["momentum"], rows, moved_TD)
        _store(self._weight_RD, rows, weight_TD.sub_(moved_TD, alpha=learning_rate))


class RowAdamW:
    """AdamW, as torch.optim.AdamW computes it for a parameter that is stepped only when it has a gradient.

    The bias correction uses each row's own number of updates, stored in `updates` [R, 1].
    """

    EPS = 1e-8

    def __init__(
        self,
        weight_RD: Tensor,
        beta1: float,
        beta2: float,
        weight_decay: float,
        moments: torch.dtype | None = None,
    ) -> None:
        self._weight_RD = weight_RD
        self._beta1, self._beta2 = beta1, beta2
        self._weight_decay = weight_decay
        self.state = {
            "first_moment": torch.zeros_like(weight_RD, dtype=moments),
            "second_moment": torch.zeros_like(weight_RD, dtype=moments),
            "updates": torch.zeros_like(weight_RD[:, :1], dtype=torch.int32),
        }

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        weight_TD, updates_T1 = self._weight_RD[rows], self.state["updates"][rows].add_(1)
        first_TD = self.state["first_moment"][rows].to(weight_TD.dtype).lerp_(grad_TD, 1 - self._beta1)
        second_TD = self.state["second_moment"][rows].to(weight_TD.dtype).mul_(self._beta2)
        second_TD.addcmul_(grad_TD, grad_TD, value=1 - self._beta2)
        for name, moved in (
            ("first_moment", first_TD),
            ("second_moment", second_TD),
            ("updates", updates_T1),
        ):
            _store(self.state[name], rows, moved)
        bias1_T1, bias2_T1 = (
            (1 - beta ** updates_T1.double()).to(weight_TD.dtype) for beta in (self._beta1, self._beta2)
        )
        size_TD = (second_TD / bias2_T1).sqrt_().add_(self.EPS).mul_(bias1_T1)
        weight_TD.mul_(1 - learning_rate * self._weight_decay)
        _store(self._weight_RD, rows, weight_TD.addcdiv_(first_TD, size_TD, value=-learning_rate))


def _store(tensor_RD: Tensor, rows: Rows, value_TD: Tensor) -> None:
    """Write rows back; torch skips the copy where they are a view of the tensor."""
    tensor_RD[rows] = value_TD.to(tensor_RD.dtype)


def build(config: HeadConfig, weight_RD: Tensor) -> RowOptimizer:
    """Return the configured optimizer; with moments = fp32 they have the weight's dtype."""
    moments = torch.bfloat16 if config.moments == "bf16" else None
    if config.optimizer == "adamw":
        return RowAdamW(weight_RD, config.momentum, config.beta2, config.weight_decay, moments)
    return RowSGD(weight_RD, config.momentum, config.weight_decay, moments)
