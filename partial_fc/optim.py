"""Optimizers of class rows: they are handed some rows and the gradient of these, and touch nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


class RowSGD:
    """SGD with momentum and weight decay, as torch.optim.SGD computes it, a slice of rows at a time.

    `state` holds the moments, each of the weight's shape, under the names that a checkpoint gives them.
    """

    def __init__(self, weight_RD: Tensor, momentum: float, weight_decay: float) -> None:
        self._weight_RD = weight_RD
        self._momentum = momentum
        self._weight_decay = weight_decay
        self.state = {"momentum": torch.zeros_like(weight_RD)}

    def update(self, rows: slice, grad_TD: Tensor, learning_rate: float) -> None:
        """Move the rows `rows` in place along their gradient [T, D]."""
        weight_TD, momentum_TD = self._weight_RD[rows], self.state["momentum"][rows]
        momentum_TD.mul_(self._momentum).add_(grad_TD).add_(weight_TD, alpha=self._weight_decay)
        weight_TD.sub_(momentum_TD, alpha=learning_rate)
