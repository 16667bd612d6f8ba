"""The margin softmax over tiles of classes: neither the logits [G, S] nor a weight gradient [S, D] exists.

Shapes: G rows (embeddings), R classes of this rank, S of them sampled, T in a tile, D the embedding size.
1. `local_softmax`, over tiles: logits of the classes that are not the target; per row their sum of
   exponentials and, as in flash attention, the running sum of exp(logit) w_j, which becomes the embedding
   gradient once the log-sum-exp of all classes is known. Targets never enter the tiles: see `targets`.
2. `embedding_gradient`, when lse of all ranks is there; the batch is remembered for
3. `weight_gradients`, over tiles again: p = exp(logit - lse) anew, for all the batches remembered; their sum
   is projected through the normalisation of the rows and handed out, tile by tile.
Extra memory: G x T + 4 T x D numbers (6 T x D if sampled), half as many again of bfloat16 if factors are
rounded to it, and G x D for each batch that is remembered.
Source of the running sums: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.config import FLOAT32_MAX_SCALE
from partial_fc.margin import Margin
from partial_fc.matmul import Inputs, Products
from partial_fc.optim import Rows
from partial_fc.sampling import Sample
from partial_fc.targets import Targets, through_unit, unit

# On a CPU, a tile's buffers should about fit the second-level caches of the cores. Seen on two cores with
# 1 MiB each, G=256, D=512, a step of 100k classes: in float32 tiles of 256 to 1024 classes take 0.67 s alike
# while the cores are free, and those of 256 the least beside other programs. Products of bfloat16 are so
# fast that larger tiles pay: 0.45 s with 256, 0.37 s with 1024, 0.45 s with 2048. Not where rows are picked
# out and copied: there a step of 500k with r = 0.1 took 0.9 s with the larger ones, 0.6 s with the smaller.
_CPU_TILE_BYTES, _CPU_TILE_BYTES_BF16 = 5 << 19, 10 << 20
_GPU_TILE_SHARE = 64


@dataclass(frozen=True)
class _Others:
    """The logits of one batch against classes that are not the target."""

    scaled_unit_GD: Tensor  # in the products' type
    label_G: Tensor  # position in the sample, -1 where the target is not here
    margin: Margin
    scale: float
    interclass_filter: float | None
    known_target_G: Tensor | None  # the target's logit over scale, for a margin that bends the others
    product: Products

    def logits(self, class_unit_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [G, T], the target among them, -inf for those filtered out; derivative by cosine."""
        logit_GT, slope_GT = self.product(self.scaled_unit_GD, class_unit_TD.T), None
        is_out_GT = None if self.interclass_filter is None else logit_GT > self.interclass_filter * self.scale
        if self.known_target_G is not None:
            bent_GT, slope_GT = self.margin.others(logit_GT / self.scale, self.known_target_G)
            logit_GT = bent_GT * self.scale
        if is_out_GT is not None:
            logit_GT.masked_fill_(is_out_GT, -torch.inf)
        return logit_GT, slope_GT


class _Sums:
    """Over the classes seen so far, targets left out: what flash attention keeps of each row."""

    def __init__(self, others: _Others, like_GD: Tensor) -> None:
        self._others = others
        # Logits up to the scale need no maximum if the type holds their exponentials; bent ones go beyond.
        self._has_maximum = others.known_target_G is not None or (
            others.scale > FLOAT32_MAX_SCALE and like_GD.dtype != torch.float64
        )
        self.sum_G = torch.zeros_like(like_GD[:, 0])  # of exp(logit - max)
        self.weighted_sum_GD = torch.zeros_like(like_GD)  # of exp(logit - max) slope w_j
        # Finite, so that a row for which no class has been seen does not come to inf - inf.
        least = torch.finfo(like_GD.dtype).min if self._has_maximum else 0
        self.max_G = torch.full_like(self.sum_G, least)

    def add(self, class_unit_TD: Tensor, start: int) -> None:
        """Take in the classes from position `start` on."""
        exp_GT, slope_GT = self._others.logits(class_unit_TD)
        _put(exp_GT, self._others.label_G - start, torch.full_like(self.max_G, -torch.inf))
        if self._has_maximum:
            self._raise_maximum(exp_GT.amax(1))
            exp_GT.sub_(self.max_G[:, None])
        self.sum_G += exp_GT.exp_().sum(1)
        if slope_GT is not None:
            exp_GT.mul_(slope_GT)
        self.weighted_sum_GD += self._others.product(exp_GT.to(class_unit_TD.dtype), class_unit_TD)

    def _raise_maximum(self, max_G: Tensor) -> None:
        last_max_G, self.max_G = self.max_G, torch.maximum(self.max_G, max_G)
        shrink_G = (last_max_G - self.max_G).exp()
        self.sum_G *= shrink_G
        self.weighted_sum_GD *= shrink_G[:, None]

    def lse(self) -> Tensor:
        return self.max_G + self.sum_G.log()


@dataclass(frozen=True)
class LocalSoftmax:
    """One batch against this rank's classes: what phase 1 leaves for the other two."""

    others_lse_G: Tensor  # over this rank's classes but the target; -inf without any
    target_G: Tensor  # target logit with margin; 0 where the target is on another rank
    targets: Targets
    others: _Others
    sums: _Sums
    sample: Sample


@dataclass(frozen=True)
class _Batch:
    """What a batch needs to be remembered for until the rows are updated."""

    others: _Others
    offset_G: Tensor  # exp(logit - offset) is the row's weight times p
    residual_G: Tensor  # the target's gradient by its cosine over scale: weight (p - 1) slope

    def gradient(self, class_unit_TD: Tensor, start: int) -> Tensor:
        """By the unit rows of the tile that begins at position `start`."""
        p_GT, slope_GT = self.others.logits(class_unit_TD)
        p_GT.sub_(self.offset_G[:, None]).exp_()
        if slope_GT is not None:
            p_GT.mul_(slope_GT)
        _put(p_GT, self.others.label_G - start, self.residual_G)
        return self.others.product(p_GT.to(class_unit_TD.dtype).T, self.others.scaled_unit_GD)


class Streaming:
    """See above. `tile` is the number of classes in a tile, None to choose it."""

    def __init__(
        self,
        margin: Margin,
        scale: float,
        interclass_filter: float | None,
        tile: int | None,
        matrix_inputs: Inputs,
        rows: torch.dtype,
    ) -> None:
        self._margin = margin
        self._scale = scale
        self._filter = interclass_filter
        self._tile = tile
        self._product = Products(matrix_inputs, rows)
        self._sample = Sample(0)
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def local_softmax(
        self, weight_RD: Tensor, sample: Sample, emb_GD: Tensor, label_G: Tensor, known_cos_G: Tensor | None
    ) -> LocalSoftmax:
        """Phase 1. `label_G` is the target's position in `sample`, -1 where it is not there.

        known_cos_G: the target cosines, wherever the target is; only for a margin that bends the others.
        """
        targets = Targets.of(self._margin, self._scale, weight_RD, sample, emb_GD, label_G)
        known_target_G = None
        if known_cos_G is not None:
            norm_G = torch.linalg.vector_norm(emb_GD, dim=1)
            known_target_G = self._margin.target(known_cos_G.to(emb_GD.dtype), norm_G).logit_G
        scaled_unit_GD = (targets.unit_GD * self._scale).to(self._product.dtype)
        others = _Others(
            scaled_unit_GD, label_G, self._margin, self._scale, self._filter, known_target_G, self._product
        )
        sums = _Sums(others, emb_GD)
        for start, rows in sample.tiles(self._tile_of(scaled_unit_GD, sample)):
            sums.add(unit(weight_RD[rows])[0].to(self._product.dtype), start)
        return LocalSoftmax(sums.lse(), targets.logit_G, targets, others, sums, sample)

    @torch.no_grad()
    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, row_weight_G: Tensor) -> Tensor:
        """Phase 2: gradient [G, D] of sum_i row_weight_i (lse_i - target_i + penalty_i), this rank's part.

        `lse_G` is over the classes of all ranks. The penalty belongs to the rank of the target. Remembers the
        batch.
        """
        residual_G = local.targets.residual(lse_G) * row_weight_G
        self._sample = local.sample
        self._batches.append(_Batch(local.others, lse_G - row_weight_G.log(), residual_G))
        pull_GD = local.sums.weighted_sum_GD * (local.sums.max_G - lse_G).exp()[:, None]
        return local.targets.embedding_gradient(pull_GD, lse_G, row_weight_G)

    @torch.no_grad()
    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        """Phase 3: (rows, gradient [T, D] of these rows) until all rows have had their turn; then forgets.

        The gradient is summed over all remembered batches. Rows handed out may be changed at once.
        """
        batches = self._batches
        self.forget()
        assert batches, "a step needs a batch"
        largest = max(batches, key=lambda batch: len(batch.offset_G)).others.scaled_unit_GD
        for start, rows in self._sample.tiles(self._tile_of(largest, self._sample)):
            yield rows, self._gradient(weight_RD[rows], start, batches)

    def forget(self) -> None:
        """Drop the remembered batches."""
        self._batches = []

    def _gradient(self, weight_TD: Tensor, start: int, batches: list[_Batch]) -> Tensor:
        """Gradient [T, D] of the rows from position `start` on, summed over `batches`.

        Finite if the losses and the embeddings' gradients are: its factors are probabilities, slopes that
        those contain, unit vectors, and the inverse norms of the rows.
        """
        class_unit_TD, inverse_norm_T = unit(weight_TD)
        factor_TD = class_unit_TD.to(self._product.dtype)
        grad_TD = batches[0].gradient(factor_TD, start)
        for batch in batches[1:]:
            grad_TD += batch.gradient(factor_TD, start)
        return through_unit(grad_TD, class_unit_TD, inverse_norm_T)

    def _tile_of(self, batch_GD: Tensor, sample: Sample) -> int:
        """Classes per tile: as configured, or a multiple of 64 that suits the cache or the GPU's memory."""
        if self._tile is not None:
            return self._tile
        if batch_GD.is_cuda:
            bytes_at_hand = torch.cuda.get_device_properties(batch_GD.device).total_memory // _GPU_TILE_SHARE
        else:
            is_fast = batch_GD.dtype == torch.bfloat16 and isinstance(sample.rows, slice)
            bytes_at_hand = _CPU_TILE_BYTES_BF16 if is_fast else _CPU_TILE_BYTES
        rows, width = batch_GD.shape
        bytes_per_class = (rows + 4 * width) * max(4, batch_GD.element_size())
        return max(1, bytes_at_hand // bytes_per_class // 64) * 64


def _put(table_GT: Tensor, column_G: Tensor, value_G: Tensor) -> None:
    """table[i, column_i] = value_i in place where the column exists; no selection, so a GPU never waits."""
    last = table_GT.shape[1] - 1
    index_G1 = column_G.clamp(0, last)[:, None]
    inside_G1 = index_G1 == column_G[:, None]
    table_GT.scatter_(1, index_G1, torch.where(inside_G1, value_G[:, None], table_GT.gather(1, index_G1)))
