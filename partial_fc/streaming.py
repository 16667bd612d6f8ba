"""The margin softmax over tiles of classes: neither the logits [G, C] nor a weight gradient [C, D] exists.

Shapes: G rows (embeddings), R classes of this rank, T of them in a tile, D the embedding size.
1. `local_softmax`, over tiles: logits of the classes that are not the target; per row their running maximum
   and sum of exponentials and, as in flash attention, the running sum of exp(logit) w_j, which becomes
   the embedding gradient once the log-sum-exp of all classes is known. The target is one class per row, and
   its row is at hand: it is dealt with outside the tiles, margin and all.
2. `embedding_gradient`, when lse of all ranks is there; the batch is remembered for
3. `weight_gradients`, over tiles again: p = exp(logit - lse) anew, for all the batches remembered; their sum
   is projected through the normalisation of the rows and handed out, tile by tile.
Extra memory: G x T + 4 T x D numbers, and G x D for each batch that is remembered.
Source of the running sums: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margin import Margin
from partial_fc.partition import tiles

# On a CPU, speed is flat while a tile's buffers fit the cache: seen for 256 to 2048 classes, G=256, D=512.
_CPU_TILE_BYTES = 4 << 20
_GPU_TILE_SHARE = 64


class _RunningSum:
    """Softmax over the classes seen so far, targets left out: what flash attention keeps of each row."""

    def __init__(self, scaled_unit_GD: Tensor) -> None:
        self.scaled_unit_GD = scaled_unit_GD
        # Finite, so that a row for which no class has been seen does not come to inf - inf.
        self.max_G = torch.full_like(scaled_unit_GD[:, 0], torch.finfo(scaled_unit_GD.dtype).min)
        self.sum_G = torch.zeros_like(self.max_G)  # of exp(logit - max)
        self.weighted_sum_GD = torch.zeros_like(scaled_unit_GD)  # of exp(logit - max) w_j

    def add(self, weight_TD: Tensor, target_column_G: Tensor) -> None:
        """Take in a tile of classes."""
        class_unit_TD, _ = _unit(weight_TD)
        exp_GT = self.scaled_unit_GD @ class_unit_TD.T
        _put(exp_GT, target_column_G, torch.full_like(self.max_G, -torch.inf))
        last_max_G, self.max_G = self.max_G, torch.maximum(self.max_G, exp_GT.amax(1))
        exp_GT.sub_(self.max_G[:, None]).exp_()
        shrink_G = (last_max_G - self.max_G).exp()
        self.sum_G.mul_(shrink_G).add_(exp_GT.sum(1))
        self.weighted_sum_GD.mul_(shrink_G[:, None]).addmm_(exp_GT, class_unit_TD)


@dataclass(frozen=True)
class LocalSoftmax:
    """One batch against this rank's classes: what phase 1 leaves for the other two."""

    lse_G: Tensor  # over this rank's classes, the target among them if it is here; -inf without classes
    target_G: Tensor  # target logit with margin; 0 where the target is on another rank
    scaled_unit_GD: Tensor
    inverse_norm_G: Tensor
    label_G: Tensor
    slope_G: Tensor  # derivative of the target's logit over scale; 0 where the target is on another rank
    target_unit_GD: Tensor
    others: _RunningSum


@dataclass(frozen=True)
class _Batch:
    """What a batch needs to be remembered for until the rows are updated."""

    scaled_unit_GD: Tensor
    label_G: Tensor
    offset_G: Tensor  # exp(logit - offset) is the row's weight times p
    residual_G: Tensor  # the target's gradient by its cosine over scale: weight (p - 1) slope

    def add_gradient(self, grad_TD: Tensor, class_unit_TD: Tensor, start: int) -> None:
        """Add the gradient by the unit rows of the tile that begins at row `start`."""
        p_GT = torch.addmm(-self.offset_G[:, None], self.scaled_unit_GD, class_unit_TD.T).exp_()
        _put(p_GT, self.label_G - start, self.residual_G)
        grad_TD.addmm_(p_GT.T, self.scaled_unit_GD)


class Streaming:
    """See above. `tile` is the number of classes in a tile, None to choose it."""

    def __init__(self, margin: Margin, scale: float, tile: int | None) -> None:
        self._margin = margin
        self._scale = scale
        self._tile = tile
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def local_softmax(self, weight_RD: Tensor, emb_GD: Tensor, label_G: Tensor) -> LocalSoftmax:
        """Phase 1. `label_G` is the target's row in `weight_RD`, -1 where it is not there."""
        unit_GD, inverse_norm_G = _unit(emb_GD)
        scaled_GD = unit_GD * self._scale
        is_here_G = label_G >= 0
        target_unit_GD = _target_units(weight_RD, label_G)
        logit_G, slope_G = self._margin.target((unit_GD * target_unit_GD).sum(1))
        target_G = (logit_G * self._scale).where(is_here_G, -torch.inf)
        others = _RunningSum(scaled_GD)
        for rows in tiles(len(weight_RD), self._tile or _default_tile(emb_GD)):
            others.add(weight_RD[rows], label_G - rows.start)
        return LocalSoftmax(
            lse_G=torch.logaddexp(others.max_G + others.sum_G.log(), target_G),
            target_G=target_G.where(is_here_G, 0),
            scaled_unit_GD=scaled_GD,
            inverse_norm_G=inverse_norm_G,
            label_G=label_G,
            slope_G=slope_G.where(is_here_G, 0),
            target_unit_GD=target_unit_GD,
            others=others,
        )

    @torch.no_grad()
    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, row_weight_G: Tensor) -> Tensor:
        """Phase 2: gradient [G, D] of sum_i row_weight_i (lse_i - target_i), this rank's classes' part of it.

        `lse_G` is over the classes of all ranks. Remembers the batch.
        """
        residual_G = torch.expm1(local.target_G - lse_G) * local.slope_G
        by_unit_GD = local.others.weighted_sum_GD * (local.others.max_G - lse_G).exp()[:, None]
        by_unit_GD.addcmul_(local.target_unit_GD, residual_G[:, None])
        by_unit_GD.mul_((row_weight_G * self._scale)[:, None])
        offset_G = lse_G - row_weight_G.log()
        self._batches.append(_Batch(local.scaled_unit_GD, local.label_G, offset_G, residual_G * row_weight_G))
        return _through_unit(by_unit_GD, local.scaled_unit_GD / self._scale, local.inverse_norm_G)

    @torch.no_grad()
    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Phase 3: (rows, gradient [T, D] of these rows) until all rows have had their turn; then forgets.

        The gradient is summed over all remembered batches. Rows handed out may be changed at once.
        """
        batches, self._batches = self._batches, []
        assert batches, "a step needs a batch"
        largest = max(batches, key=lambda batch: len(batch.label_G)).scaled_unit_GD
        for rows in tiles(len(weight_RD), self._tile or _default_tile(largest)):
            yield rows, _tile_gradient(weight_RD[rows], rows.start, batches)


def _tile_gradient(weight_TD: Tensor, start: int, batches: list[_Batch]) -> Tensor:
    """Gradient [T, D] of the rows from `start` on, summed over `batches`."""
    class_unit_TD, inverse_norm_T = _unit(weight_TD)
    grad_TD = torch.zeros_like(class_unit_TD)
    for batch in batches:
        batch.add_gradient(grad_TD, class_unit_TD, start)
    return _through_unit(grad_TD, class_unit_TD, inverse_norm_T)


def _unit(vector_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1 / norm. A vector of zeros stays so and, with 1 / norm set to 0, has no gradient."""
    norm_N = torch.linalg.vector_norm(vector_ND, dim=1)
    inverse_norm_N = torch.where(norm_N == 0, 0, 1 / norm_N)
    return vector_ND * inverse_norm_N[:, None], inverse_norm_N


def _through_unit(grad_ND: Tensor, unit_ND: Tensor, inverse_norm_N: Tensor) -> Tensor:
    """Gradient by the vectors from that by their unit vectors, which is overwritten."""
    along_N = (grad_ND * unit_ND).sum(1)
    return grad_ND.addcmul_(unit_ND, -along_N[:, None]).mul_(inverse_norm_N[:, None])


def _target_units(weight_RD: Tensor, label_G: Tensor) -> Tensor:
    """Unit rows [G, D] of the targets; any row where the target is not here, zeros if there is none."""
    if len(weight_RD) == 0:
        return weight_RD.new_zeros(len(label_G), weight_RD.shape[1])
    return _unit(weight_RD[label_G.clamp(min=0)])[0]


def _put(table_GT: Tensor, column_G: Tensor, value_G: Tensor) -> None:
    """table[i, column_i] = value_i in place where the column exists; no selection, so a GPU never waits."""
    last = table_GT.shape[1] - 1
    index_G1 = column_G.clamp(0, last)[:, None]
    inside_G1 = index_G1 == column_G[:, None]
    table_GT.scatter_(1, index_G1, torch.where(inside_G1, value_G[:, None], table_GT.gather(1, index_G1)))


def _default_tile(batch_GD: Tensor) -> int:
    """Classes per tile, a multiple of 64, whose buffers fit the cache or a small part of the GPU's memory."""
    if batch_GD.device.type == "cuda":
        bytes_at_hand = torch.cuda.get_device_properties(batch_GD.device).total_memory // _GPU_TILE_SHARE
    else:
        bytes_at_hand = _CPU_TILE_BYTES
    rows, width = batch_GD.shape
    bytes_per_class = (rows + 4 * width) * batch_GD.element_size()
    return max(1, bytes_at_hand // bytes_per_class // 64) * 64
