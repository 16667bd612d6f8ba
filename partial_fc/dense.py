"""The margin softmax in plain PyTorch: all logits [G, R] at once, gradients by autograd.

The twin with which tests and benchmarks compare, in the same three phases as `streaming`, on small code that
is easy to believe: nothing here is derived by hand but the share of this rank in the softmax of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margin import Margin


@dataclass(frozen=True)
class LocalSoftmax:
    """One batch against this rank's classes; lse_G and target_G carry their graph."""

    lse_G: Tensor
    target_G: Tensor
    emb_GD: Tensor
    weight_RD: Tensor


class Dense:
    """See above; each method does what the one of the same name does in `streaming.Streaming`."""

    def __init__(self, margin: Margin, scale: float) -> None:
        self._margin = margin
        self._scale = scale
        self._grad_RD: Tensor | None = None

    @torch.enable_grad()
    def local_softmax(self, weight_RD: Tensor, emb_GD: Tensor, label_G: Tensor) -> LocalSoftmax:
        emb_GD, weight_RD = emb_GD.detach().requires_grad_(), weight_RD.detach().requires_grad_()
        cos_GR = _unit(emb_GD) @ _unit(weight_RD).T
        if len(weight_RD) == 0:
            nothing_G = cos_GR.sum(1)
            return LocalSoftmax(nothing_G - torch.inf, nothing_G, emb_GD, weight_RD)
        here_G, column_G1 = label_G >= 0, label_G.clamp(min=0)[:, None]
        cos_G = cos_GR.gather(1, column_G1)[:, 0]
        target_G = self._margin.target(cos_G)[0]
        logits_GR = self._scale * cos_GR.scatter(1, column_G1, target_G.where(here_G, cos_G)[:, None])
        return LocalSoftmax(logits_GR.logsumexp(1), self._scale * target_G * here_G, emb_GD, weight_RD)

    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, row_weight_G: Tensor) -> Tensor:
        # Of lse over all ranks, this rank's classes hold exp(local lse - lse): so does its gradient.
        part_G = (local.lse_G.detach() - lse_G).exp()
        grad_GD, grad_RD = torch.autograd.grad(
            [local.lse_G, local.target_G],
            [local.emb_GD, local.weight_RD],
            [row_weight_G * part_G, -row_weight_G],
        )
        self._grad_RD = grad_RD if self._grad_RD is None else self._grad_RD + grad_RD
        return grad_GD

    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        grad_RD, self._grad_RD = self._grad_RD, None
        assert grad_RD is not None, "a step needs a batch"
        yield slice(0, len(weight_RD)), grad_RD


def _unit(vector_ND: Tensor) -> Tensor:
    """Unit vectors; zeros stay zeros and have no gradient."""
    norm_N1 = vector_ND.norm(dim=1, keepdim=True)
    is_zero_N1 = norm_N1 == 0
    return torch.where(is_zero_N1, 0, vector_ND / norm_N1.masked_fill(is_zero_N1, 1))
