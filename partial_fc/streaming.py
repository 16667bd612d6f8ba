"""The margin softmax over tiles of classes: neither the logits [G, S] nor a weight gradient [S, D] exists.

Shapes: G rows (embeddings), R classes of this rank, S of them sampled, T in a tile, D the embedding size.
1. `local_softmax`, over tiles: logits of the classes that are not the target; per row their running maximum
   and sum of exponentials and, as in flash attention, the running sum of exp(logit) w_j, which becomes
   the embedding gradient once the log-sum-exp of all classes is known. The target is one class per row, and
   its row is at hand: it is dealt with outside the tiles, margin and all.
2. `embedding_gradient`, when lse of all ranks is there; the batch is remembered for
3. `weight_gradients`, over tiles again: p = exp(logit - lse) anew, for all the batches remembered; their sum
   is projected through the normalisation of the rows and handed out, tile by tile.
Extra memory: G x T + 4 T x D numbers (6 T x D if sampled), and G x D for each batch that is remembered.
Source of the running sums: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margin import Margin
from partial_fc.optim import Rows
from partial_fc.sampling import Sample

# On a CPU, a tile's buffers should about fit the second-level caches of the cores. Seen on two cores with
# 1 MiB each, G=256, D=512, a step of 100k classes: tiles of 256 take 0.76 s, of 448 to 2048 from 0.85 to
# 0.98 s; the matrix products alone take 0.71 s.
_CPU_TILE_BYTES = 5 << 19
_GPU_TILE_SHARE = 64


@dataclass(frozen=True)
class _Others:
    """The logits of one batch against classes that are not the target."""

    scaled_unit_GD: Tensor
    label_G: Tensor  # position in the sample, -1 where the target is not here
    margin: Margin
    scale: float
    interclass_filter: float | None
    known_target_G: Tensor | None  # the target's logit over scale, for a margin that bends the others

    def logits(self, class_unit_TD: Tensor, lower_G: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """logit - lower [G, T], the target among them, -inf for those filtered out; derivative by cosine."""
        if lower_G is None:
            return self._bent(self.scaled_unit_GD @ class_unit_TD.T)
        if self.known_target_G is None and self.interclass_filter is None:
            return torch.addmm(-lower_G[:, None], self.scaled_unit_GD, class_unit_TD.T), None
        # Not folded into the product, so that rounding leaves the same classes out in both passes.
        logit_GT, slope_GT = self.logits(class_unit_TD)
        return logit_GT.sub_(lower_G[:, None]), slope_GT

    def _bent(self, logit_GT: Tensor) -> tuple[Tensor, Tensor | None]:
        slope_GT, is_out_GT = None, None
        if self.interclass_filter is not None:
            is_out_GT = logit_GT > self.interclass_filter * self.scale
        if self.known_target_G is not None:
            bent_GT, slope_GT = self.margin.others(logit_GT / self.scale, self.known_target_G)
            logit_GT = bent_GT * self.scale
        if is_out_GT is not None:
            logit_GT.masked_fill_(is_out_GT, -torch.inf)
        return logit_GT, slope_GT


class _RunningSum:
    """Softmax over the classes seen so far, targets left out: what flash attention keeps of each row."""

    def __init__(self, others: _Others) -> None:
        self._others = others
        scaled_unit_GD = others.scaled_unit_GD
        # Finite, so that a row for which no class has been seen does not come to inf - inf.
        self.max_G = torch.full_like(scaled_unit_GD[:, 0], torch.finfo(scaled_unit_GD.dtype).min)
        self.sum_G = torch.zeros_like(self.max_G)  # of exp(logit - max)
        self.weighted_sum_GD = torch.zeros_like(scaled_unit_GD)  # of exp(logit - max) slope w_j

    def add(self, class_unit_TD: Tensor, start: int) -> None:
        """Take in the classes from position `start` on."""
        exp_GT, slope_GT = self._others.logits(class_unit_TD)
        _put(exp_GT, self._others.label_G - start, torch.full_like(self.max_G, -torch.inf))
        last_max_G, self.max_G = self.max_G, torch.maximum(self.max_G, exp_GT.amax(1))
        exp_GT.sub_(self.max_G[:, None]).exp_()
        shrink_G = (last_max_G - self.max_G).exp()
        self.sum_G.mul_(shrink_G).add_(exp_GT.sum(1))
        if slope_GT is not None:
            exp_GT.mul_(slope_GT)
        self.weighted_sum_GD.mul_(shrink_G[:, None]).addmm_(exp_GT, class_unit_TD)

    def lse(self) -> Tensor:
        return self.max_G + self.sum_G.log()


@dataclass(frozen=True)
class LocalSoftmax:
    """One batch against this rank's classes: what phase 1 leaves for the other two."""

    others_lse_G: Tensor  # over this rank's classes but the target; -inf without any
    target_G: Tensor  # target logit with margin; 0 where the target is on another rank
    by_cos_G: Tensor  # derivative of the target's logit over scale; 0 where the target is on another rank
    by_norm_G: Tensor | None
    by_norm_penalty_G: Tensor | None
    target_unit_GD: Tensor
    unit_GD: Tensor
    inverse_norm_G: Tensor
    others: _Others
    sums: _RunningSum
    sample: Sample


@dataclass(frozen=True)
class _Batch:
    """What a batch needs to be remembered for until the rows are updated."""

    others: _Others
    offset_G: Tensor  # exp(logit - offset) is the row's weight times p
    residual_G: Tensor  # the target's gradient by its cosine over scale: weight (p - 1) slope

    def add_gradient(self, grad_TD: Tensor, class_unit_TD: Tensor, start: int) -> None:
        """Add the gradient by the unit rows of the tile that begins at position `start`."""
        p_GT, slope_GT = self.others.logits(class_unit_TD, self.offset_G)
        p_GT.exp_()
        if slope_GT is not None:
            p_GT.mul_(slope_GT)
        _put(p_GT, self.others.label_G - start, self.residual_G)
        grad_TD.addmm_(p_GT.T, self.others.scaled_unit_GD)


class Streaming:
    """See above. `tile` is the number of classes in a tile, None to choose it."""

    def __init__(
        self, margin: Margin, scale: float, interclass_filter: float | None, tile: int | None
    ) -> None:
        self._margin = margin
        self._scale = scale
        self._filter = interclass_filter
        self._tile = tile
        self._sample = Sample(0)
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def local_softmax(
        self, weight_RD: Tensor, sample: Sample, emb_GD: Tensor, label_G: Tensor, known_cos_G: Tensor | None
    ) -> LocalSoftmax:
        """Phase 1. `label_G` is the target's position in `sample`, -1 where it is not there.

        known_cos_G: the target cosines, wherever the target is; only for a margin that bends the others.
        """
        norm_G = torch.linalg.vector_norm(emb_GD, dim=1)
        unit_GD, inverse_norm_G = unit(emb_GD)
        is_here_G = label_G >= 0
        target_unit_GD = target_units(weight_RD, sample, label_G)
        target = self._margin.target((unit_GD * target_unit_GD).sum(1), norm_G)
        penalty = self._margin.penalty(norm_G)
        known_target_G = None
        if known_cos_G is not None:
            known_target_G = self._margin.target(known_cos_G.to(emb_GD.dtype), norm_G).logit_G
        others = _Others(
            unit_GD * self._scale, label_G, self._margin, self._scale, self._filter, known_target_G
        )
        sums = _RunningSum(others)
        for start, rows in sample.tiles(self._tile or _default_tile(emb_GD)):
            sums.add(unit(weight_RD[rows])[0], start)
        return LocalSoftmax(
            others_lse_G=sums.lse(),
            target_G=(target.logit_G * self._scale).where(is_here_G, 0),
            by_cos_G=target.by_cos_G.where(is_here_G, 0),
            by_norm_G=None if target.by_norm_G is None else target.by_norm_G.where(is_here_G, 0),
            by_norm_penalty_G=None if penalty is None else penalty[1].where(is_here_G, 0),
            target_unit_GD=target_unit_GD,
            unit_GD=unit_GD,
            inverse_norm_G=inverse_norm_G,
            others=others,
            sums=sums,
            sample=sample,
        )

    @torch.no_grad()
    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, row_weight_G: Tensor) -> Tensor:
        """Phase 2: gradient [G, D] of sum_i row_weight_i (lse_i - target_i + penalty_i), this rank's part.

        `lse_G` is over the classes of all ranks. The penalty belongs to the rank of the target. Remembers the
        batch.
        """
        pull_G = torch.expm1(local.target_G - lse_G)
        residual_G = pull_G * local.by_cos_G
        by_unit_GD = local.sums.weighted_sum_GD * (local.sums.max_G - lse_G).exp()[:, None]
        by_unit_GD.addcmul_(local.target_unit_GD, residual_G[:, None])
        by_unit_GD.mul_((row_weight_G * self._scale)[:, None])
        offset_G = lse_G - row_weight_G.log()
        self._sample = local.sample
        self._batches.append(_Batch(local.others, offset_G, residual_G * row_weight_G))
        grad_GD = _through_unit(by_unit_GD, local.unit_GD, local.inverse_norm_G)
        by_norm_G = torch.zeros_like(lse_G)
        if local.by_norm_G is not None:
            by_norm_G += pull_G * self._scale * local.by_norm_G
        if local.by_norm_penalty_G is not None:
            by_norm_G += local.by_norm_penalty_G
        return grad_GD.addcmul_(local.unit_GD, (by_norm_G * row_weight_G)[:, None])

    @torch.no_grad()
    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        """Phase 3: (rows, gradient [T, D] of these rows) until all rows have had their turn; then forgets.

        The gradient is summed over all remembered batches. Rows handed out may be changed at once.
        """
        batches = self._batches
        self.forget()
        assert batches, "a step needs a batch"
        largest = max(batches, key=lambda batch: len(batch.offset_G)).others.scaled_unit_GD
        for start, rows in self._sample.tiles(self._tile or _default_tile(largest)):
            yield rows, _tile_gradient(weight_RD[rows], start, batches)

    def forget(self) -> None:
        """Drop the remembered batches."""
        self._batches = []


def _tile_gradient(weight_TD: Tensor, start: int, batches: list[_Batch]) -> Tensor:
    """Gradient [T, D] of the rows from position `start` on, summed over `batches`.

    Finite if the losses and the embeddings' gradients are: its factors are probabilities, slopes that those
    contain, unit vectors, and the inverse norms of the rows.
    """
    class_unit_TD, inverse_norm_T = unit(weight_TD)
    grad_TD = torch.zeros_like(class_unit_TD)
    for batch in batches:
        batch.add_gradient(grad_TD, class_unit_TD, start)
    return _through_unit(grad_TD, class_unit_TD, inverse_norm_T)


def unit(vector_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1 / norm. A vector of zeros stays so and, with 1 / norm set to 0, has no gradient."""
    norm_N = torch.linalg.vector_norm(vector_ND, dim=1)
    inverse_norm_N = torch.where(norm_N == 0, 0, 1 / norm_N)
    return vector_ND * inverse_norm_N[:, None], inverse_norm_N


def target_units(weight_RD: Tensor, sample: Sample, label_G: Tensor) -> Tensor:
    """Unit rows [G, D] of the targets; any row where the target is not here, zeros if there is none."""
    if len(sample) == 0:
        return weight_RD.new_zeros(len(label_G), weight_RD.shape[1])
    return unit(weight_RD[sample.row_at(label_G.clamp(min=0))])[0]


def _through_unit(grad_ND: Tensor, unit_ND: Tensor, inverse_norm_N: Tensor) -> Tensor:
    """Gradient by the vectors from that by their unit vectors, which is overwritten."""
    along_N = (grad_ND * unit_ND).sum(1)
    return grad_ND.addcmul_(unit_ND, -along_N[:, None]).mul_(inverse_norm_N[:, None])


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
