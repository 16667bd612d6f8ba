"""The target class of each row: its margin, its penalty and its part of the gradient.

There is one target per row, so `streaming` and `kernels` exclude it from their sums over tiles, and it is
computed here once per row.
Shapes: G rows (embeddings), R classes of this rank, D the embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.margin import Margin
from partial_fc.sampling import Sample


class Embeddings(NamedTuple):
    """The gathered embeddings of one batch, not normalised.

    target_position_G: int64 [G], the target's position in the sample, -1 where it is not in it.
    known_cos_G: the target cosines of all rows, on whichever rank the target is; None unless the margin
    modifies negatives.
    """

    emb_GD: Tensor
    target_position_G: Tensor
    known_cos_G: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """Targets of one batch; entries are 0 for rows whose target is on another rank."""

    logit_G: Tensor  # with margin and scale
    dlogit_dcos_G: Tensor  # derivative of logit / scale with respect to the cosine
    by_norm_G: Tensor  # derivative of the logit with respect to the embedding's norm
    by_norm_penalty_G: Tensor  # derivative of the penalty with respect to the norm
    class_unit_GD: Tensor
    unit_GD: Tensor
    inverse_norm_G: Tensor
    scale: float

    @classmethod
    def of(
        cls, margin: Margin, scale: float, weight_RD: Tensor, sample: Sample, batch: Embeddings
    ) -> Targets:
        """Compute the targets of one batch."""
        norm_G = torch.linalg.vector_norm(batch.emb_GD, dim=1)
        unit_GD, inverse_norm_G = unit(batch.emb_GD)
        class_unit_GD = target_units(weight_RD, sample, batch.target_position_G)
        target = margin.target((unit_GD * class_unit_GD).sum(1), norm_G)
        penalty = margin.penalty(norm_G)
        nothing_G = torch.zeros_like(norm_G)
        by_norm_G = nothing_G if target.by_norm_G is None else target.by_norm_G * scale
        by_norm_penalty_G = nothing_G if penalty is None else penalty[1]
        is_here_G = batch.target_position_G >= 0
        return cls(
            logit_G=(target.logit_G * scale).where(is_here_G, 0),
            dlogit_dcos_G=target.dlogit_dcos_G.where(is_here_G, 0),
            by_norm_G=by_norm_G.where(is_here_G, 0),
            by_norm_penalty_G=by_norm_penalty_G.where(is_here_G, 0),
            class_unit_GD=class_unit_GD,
            unit_GD=unit_GD,
            inverse_norm_G=inverse_norm_G,
            scale=scale,
        )

    def residual(self, lse_G: Tensor) -> Tensor:
        """Return d(loss) / d(target cosine) / scale, [G]: (p - 1) times the margin's slope."""
        return self._error(lse_G) * self.dlogit_dcos_G

    def embedding_gradient(self, others_grad_GD: Tensor, lse_G: Tensor, loss_weight_G: Tensor) -> Tensor:
        """Return this rank's part of the gradient [G, D] of sum_i loss_weight_i loss_i.

        The gradient is with respect to the embeddings.
        others_grad_GD: sum over the other classes of p_j times their slope times w_j; it is overwritten.
        """
        by_unit_GD = others_grad_GD.addcmul_(self.class_unit_GD, self.residual(lse_G)[:, None])
        by_unit_GD.mul_((loss_weight_G * self.scale)[:, None])
        grad_GD = through_unit(by_unit_GD, self.unit_GD, self.inverse_norm_G)
        by_norm_G = self._error(lse_G) * self.by_norm_G + self.by_norm_penalty_G
        return grad_GD.addcmul_(self.unit_GD, (by_norm_G * loss_weight_G)[:, None])

    def _error(self, lse_G: Tensor) -> Tensor:
        """Return p - 1 of the target, without cancellation where p is close to 1."""
        return torch.expm1(self.logit_G - lse_G)


def unit(vector_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors and 1 / norm. A zero vector stays zero, with 1 / norm 0 and so no gradient."""
    norm_N = torch.linalg.vector_norm(vector_ND, dim=1)
    inverse_norm_N = torch.where(norm_N == 0, 0, 1 / norm_N)
    return vector_ND * inverse_norm_N[:, None], inverse_norm_N


def through_unit(grad_ND: Tensor, unit_ND: Tensor, inverse_norm_N: Tensor) -> Tensor:
    """Return the gradient with respect to the vectors, given that of their unit vectors (overwritten)."""
    along_N = (grad_ND * unit_ND).sum(1)
    return grad_ND.addcmul_(unit_ND, -along_N[:, None]).mul_(inverse_norm_N[:, None])


def target_units(weight_RD: Tensor, sample: Sample, target_position_G: Tensor) -> Tensor:
    """Return the targets' unit rows [G, D].

    The entry is an arbitrary row where the target is on another rank, and zero if the sample is empty.
    """
    if len(sample) == 0:
        return weight_RD.new_zeros(len(target_position_G), weight_RD.shape[1])
    return unit(weight_RD[sample.row_at(target_position_G.clamp(min=0))])[0]
