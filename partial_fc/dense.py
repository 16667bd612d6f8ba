"""The margin softmax in plain PyTorch: all logits [G, S] at once, gradients by autograd.

It is the reference that tests and benchmarks compare the other backends with, in the same three phases as
`streaming`. Only one derivative is written by hand: this rank's part in the log-sum-exp over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margin import Margin
from partial_fc.optim import Rows
from partial_fc.sampling import Sample
from partial_fc.targets import Embeddings


@dataclass(frozen=True)
class LocalSoftmax:
    """Softmax of one batch over this rank's classes; all tensors carry their autograd graph."""

    others_lse_G: Tensor
    target_G: Tensor
    penalty_G: Tensor
    emb_GD: Tensor
    weight_SD: Tensor
    sample: Sample


class Dense:
    """Reference backend; the methods are documented in `streaming.Streaming`."""

    def __init__(self, margin: Margin, scale: float, interclass_filter: float | None) -> None:
        self._margin = margin
        self._scale = scale
        self._filter = interclass_filter
        self._rows: Rows = slice(0, 0)
        self._grad_SD: Tensor | None = None

    @torch.enable_grad()
    def local_softmax(self, weight_RD: Tensor, sample: Sample, batch: Embeddings) -> LocalSoftmax:
        emb_GD = batch.emb_GD.detach().requires_grad_()
        weight_SD = weight_RD.detach()[sample.rows].requires_grad_()
        cos_GS = _unit(emb_GD) @ _unit(weight_SD).T
        position_S = torch.arange(len(sample), device=emb_GD.device)
        is_target_GS = position_S == batch.target_position_G[:, None]
        is_here_G = is_target_GS.any(1)
        norm_G = emb_GD.norm(dim=1)
        target_G = self._margin.target((cos_GS * is_target_GS).sum(1), norm_G).logit_G * is_here_G
        other_GS = cos_GS
        if batch.known_cos_G is not None:
            bound_G = self._margin.target(batch.known_cos_G, norm_G.detach()).logit_G
            other_GS, _ = self._margin.others(cos_GS, bound_G)
        left_out_GS = is_target_GS
        if self._filter is not None:
            left_out_GS = is_target_GS | (cos_GS > self._filter)
        others_lse_G = (self._scale * other_GS).masked_fill(left_out_GS, -torch.inf).logsumexp(1)
        penalty = self._margin.penalty(norm_G)
        penalty_G = torch.zeros_like(norm_G) if penalty is None else penalty[0] * is_here_G
        return LocalSoftmax(
            others_lse_G, self._scale * target_G, penalty_G + 0 * norm_G, emb_GD, weight_SD, sample
        )

    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, loss_weight_G: Tensor) -> Tensor:
        # d(lse over all ranks) / d(this rank's lse) = exp(this rank's lse - lse over all ranks).
        others_part_G = (local.others_lse_G.detach() - lse_G).exp()
        target_part_G = (local.target_G.detach() - lse_G).exp() - 1
        grad_GD, grad_SD = torch.autograd.grad(
            [local.others_lse_G, local.target_G, local.penalty_G],
            [local.emb_GD, local.weight_SD],
            [loss_weight_G * others_part_G, loss_weight_G * target_part_G, loss_weight_G],
        )
        self._rows = local.sample.rows
        self._grad_SD = grad_SD if self._grad_SD is None else self._grad_SD + grad_SD
        return grad_GD

    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        grad_SD = self._grad_SD
        self.forget()
        assert grad_SD is not None, "a step needs a batch"
        yield self._rows, grad_SD

    def forget(self) -> None:
        self._grad_SD = None


def _unit(vector_ND: Tensor) -> Tensor:
    """Return unit vectors; zero vectors stay zero and receive no gradient."""
    norm_N1 = vector_ND.norm(dim=1, keepdim=True)
    is_zero_N1 = norm_N1 == 0
    return torch.where(is_zero_N1, 0, vector_ND / norm_N1.masked_fill(is_zero_N1, 1))
