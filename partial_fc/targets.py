"""The target class of each row: one per row and its own row at hand, so it never enters the tiles.

`streaming` and `kernels` leave it out of their sums; margin, penalty and its part of the gradient are here.
Shapes: G rows (embeddings), R classes of this rank, D the embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margin import Margin
from partial_fc.sampling import Sample


@dataclass(frozen=True)
class Targets:
    """One batch against its targets; what is on another rank counts 0."""

    logit_G: Tensor  # with margin and scale
    dlogit_dcos_G: Tensor  # derivative of the logit over scale
    by_norm_G: Tensor  # derivative, by the embedding's norm, of the logit
    by_norm_penalty_G: Tensor  # and of the penalty
    class_unit_GD: Tensor
    unit_GD: Tensor
    inverse_norm_G: Tensor
    scale: float

    @classmethod
    def of(
        cls, margin: Margin, scale: float, weight_RD: Tensor, sample: Sample, emb_GD: Tensor, label_G: Tensor
    ) -> Targets:
        """`label_G` is the target's position in `sample`, -1 where it is not there."""
        norm_G = torch.linalg.vector_norm(emb_GD, dim=1)
        unit_GD, inverse_norm_G = unit(emb_GD)
        class_unit_GD = target_units(weight_RD, sample, label_G)
        target = margin.target((unit_GD * class_unit_GD).sum(1), norm_G)
        penalty = margin.penalty(norm_G)
        nothing_G = torch.zeros_like(norm_G)
        by_norm_G = nothing_G if target.by_norm_G is None else target.by_norm_G * scale
        by_norm_penalty_G = nothing_G if penalty is None else penalty[1]
        is_here_G = label_G >= 0
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
        """Gradient of the loss by the target's cosine, over scale: (p - 1) times the margin's slope."""
        return self._pull(lse_G) * self.dlogit_dcos_G

    def embedding_gradient(self, pull_GD: Tensor, lse_G: Tensor, row_weight_G: Tensor) -> Tensor:
        """Gradient [G, D] of sum_i row_weight_i loss_i by the embeddings, this rank's part.

        pull_GD, which is overwritten: sum over the other classes of p_j times their slope times w_j.
        """
        by_unit_GD = pull_GD.addcmul_(self.class_unit_GD, self.residual(lse_G)[:, None])
        by_unit_GD.mul_((row_weight_G * self.scale)[:, None])
        grad_GD = through_unit(by_unit_GD, self.unit_GD, self.inverse_norm_G)
        by_norm_G = self._pull(lse_G) * self.by_norm_G + self.by_norm_penalty_G
        return grad_GD.addcmul_(self.unit_GD, (by_norm_G * row_weight_G)[:, None])

    def _pull(self, lse_G: Tensor) -> Tensor:
        """p - 1 of the target, exact where p is nearly 1."""
        return torch.expm1(self.logit_G - lse_G)


def unit(vector_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1 / norm. A vector of zeros stays so and, with 1 / norm set to 0, has no gradient."""
    norm_N = torch.linalg.vector_norm(vector_ND, dim=1)
    inverse_norm_N = torch.where(norm_N == 0, 0, 1 / norm_N)
    return vector_ND * inverse_norm_N[:, None], inverse_norm_N


def through_unit(grad_ND: Tensor, unit_ND: Tensor, inverse_norm_N: Tensor) -> Tensor:
    """Gradient by the vectors from that by their unit vectors, which is overwritten."""
    along_N = (grad_ND * unit_ND).sum(1)
    return grad_ND.addcmul_(unit_ND, -along_N[:, None]).mul_(inverse_norm_N[:, None])


def target_units(weight_RD: Tensor, sample: Sample, label_G: Tensor) -> Tensor:
    """Unit rows [G, D] of the targets; any row where the target is not here, zeros if there is none."""
    if len(sample) == 0:
        return weight_RD.new_zeros(len(label_G), weight_RD.shape[1])
    return unit(weight_RD[sample.row_at(label_G.clamp(min=0))])[0]
