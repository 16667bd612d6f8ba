"""Optimizers of class rows: they are handed some rows and the gradient of these, and touch nothing else.

Rows that a step does not sample keep their weights and moments as they are, decay included.
`state` holds the moments under the names that a checkpoint gives them; they are computed in the weight's
type and kept in the configured one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from partial_fc.config import HeadConfig

Rows = slice | Tensor


class RowOptimizer(Protocol):
    """What the head asks of an optimizer."""

    state: dict[str, Tensor]

    def update(self, rows: Rows, grad_TD: Tensor, learning_rate: float) -> None:
        """Move the rows `rows` in place along their gradient [T, D], which may be overwritten."""
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
    """AdamW, as torch.optim.AdamW computes it for a parameter that is stepped when it has a gradient.

    The moments' bias is corrected by the number of updates that a row has had, kept in `updates` [R, 1].
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
    """Put rows back; those that are a view of the tensor are there already, and torch sees that."""
    tensor_RD[rows] = value_TD.to(tensor_RD.dtype)


def build(config: HeadConfig, weight_RD: Tensor) -> RowOptimizer:
    """The optimizer that the configuration names; fp32 moments are of the weight's own type."""
    moments = torch.bfloat16 if config.moments == "bf16" else None
    if config.optimizer == "adamw":
        return RowAdamW(weight_RD, config.momentum, config.beta2, config.weight_decay, moments)
    return RowSGD(weight_RD, config.momentum, config.weight_decay, moments)
