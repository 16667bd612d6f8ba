"""The margin softmax over tiles of classes: logits [G, S] and weight gradient [S, D] are never allocated.

1. `local_softmax`, over tiles: the sums over the classes that are not the target. Targets: see `targets`.
2. `embedding_gradient`: the gradient for the backbone, once the log-sum-exp over all ranks is known. It
   stores the values of this micro-batch for phase 3; with gradient accumulation there are several.
3. `weight_gradients`, over tiles again: recomputes p = exp(logit - lse) of all stored micro-batches.
Shapes: G embeddings, R classes of this rank, S of them sampled, T in a tile, D the embedding size.
Extra memory in float32: 4 (G T + 4 T D) bytes, with sampling 4 (G T + 6 T D), half as much again for copies
in bfloat16, and 4 G D for each stored micro-batch.
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
from partial_fc.targets import Embeddings, Targets, through_unit, unit

# On a CPU, a tile's buffers should roughly fit the second-level caches of the cores. Measured on two cores
# with 1 MiB each, G=256, D=512, a step of 100k classes: in float32, tiles of 256 to 1024 classes all take
# 0.67 s on free cores, and tiles of 256 are the fastest on busy ones. Products of bfloat16 are so fast that
# larger tiles pay: 0.45 s with 256, 0.37 s with 1024, 0.45 s with 2048. They do not pay where sampled rows
# are copied: a step of 500k with r = 0.1 took 0.9 s with the larger tiles, 0.6 s with the smaller ones.
_CPU_TILE_BYTES, _CPU_TILE_BYTES_BF16 = 5 << 19, 10 << 20
_GPU_TILE_SHARE = 64


@dataclass(frozen=True)
class _Others:
    """Logits of one batch for the classes that are not the target."""

    scaled_unit_GD: Tensor  # in the products' dtype
    target_position_G: Tensor  # position among the sampled classes, -1 where the target is on another rank
    margin: Margin
    scale: float
    interclass_filter: float | None
    # Target logit / scale of all embeddings, on every rank; None unless the margin modifies negatives.
    known_target_G: Tensor | None
    product: Products

    def logits(self, class_unit_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits [G, T] and their derivatives with respect to the cosine (None: all 1).

        Filtered classes have logit -inf. The target's column is still included: callers overwrite it.
        """
        logit_GT, slope_GT = self.product(self.scaled_unit_GD, class_unit_TD.T), None
        is_out_GT = None if self.interclass_filter is None else logit_GT > self.interclass_filter * self.scale
        if self.known_target_G is not None:
            modified_GT, slope_GT = self.margin.others(logit_GT / self.scale, self.known_target_G)
            logit_GT = modified_GT * self.scale
        if is_out_GT is not None:
            logit_GT.masked_fill_(is_out_GT, -torch.inf)
        return logit_GT, slope_GT


class _Sums:
    """Running sums over the classes of the tiles so far, without the targets, as in flash attention.

    `weighted_sum_GD` becomes the embedding gradient once the log-sum-exp of all classes is known.
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """

    def __init__(self, others: _Others, like_GD: Tensor) -> None:
        self._others = others
        # Logits up to the scale need no maximum if the dtype holds their exponentials. Modified negatives can
        # exceed the scale.
        self._has_maximum = others.known_target_G is not None or (
            others.scale > FLOAT32_MAX_SCALE and like_GD.dtype != torch.float64
        )
        self.sum_G = torch.zeros_like(like_GD[:, 0])  # of exp(logit - max)
        # Over classes j: exp(logit_j - max) * slope_j * unit row_j.
        self.weighted_sum_GD = torch.zeros_like(like_GD)
        # Finite, so that an embedding without any class so far does not compute inf - inf.
        least = torch.finfo(like_GD.dtype).min if self._has_maximum else 0
        self.max_G = torch.full_like(self.sum_G, least)

    def add(self, class_unit_TD: Tensor, start: int) -> None:
        """Add the classes of the tile that begins at position `start`."""
        exp_GT, slope_GT = self._others.logits(class_unit_TD)
        _put(exp_GT, self._others.target_position_G - start, torch.full_like(self.max_G, -torch.inf))
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
        """Return the log-sum-exp [G] of the classes so far."""
        return self.max_G + self.sum_G.log()


@dataclass(frozen=True)
class LocalSoftmax:
    """Result of phase 1 for one batch and this rank's classes, read by the other two phases."""

    others_lse_G: Tensor  # over this rank's classes except the target; -inf if there are none
    target_G: Tensor  # target logit with margin; 0 where the target is on another rank
    targets: Targets
    others: _Others
    sums: _Sums
    sample: Sample


@dataclass(frozen=True)
class _Batch:
    """Values of a micro-batch that phase 3 needs."""

    others: _Others
    offset_G: Tensor  # exp(logit - offset) is p times the loss weight of the embedding
    residual_G: Tensor  # d(loss) / d(target cosine) / scale: weight * (p - 1) * slope

    def gradient(self, class_unit_TD: Tensor, start: int) -> Tensor:
        """Return the gradient [T, D] with respect to the unit rows of the tile that begins at `start`."""
        p_GT, slope_GT = self.others.logits(class_unit_TD)
        p_GT.sub_(self.offset_G[:, None]).exp_()
        if slope_GT is not None:
            p_GT.mul_(slope_GT)
        _put(p_GT, self.others.target_position_G - start, self.residual_G)
        return self.others.product(p_GT.to(class_unit_TD.dtype).T, self.others.scaled_unit_GD)


class Streaming:
    """Backend in plain PyTorch. `tile` is the number of classes in a tile; None chooses it."""

    def __init__(
        self,
        margin: Margin,
        scale: float,
        interclass_filter: float | None,
        tile: int | None,
        matrix_inputs: Inputs,
        rows_dtype: torch.dtype,
    ) -> None:
        self._margin = margin
        self._scale = scale
        self._filter = interclass_filter
        self._tile = tile
        self._product = Products(matrix_inputs, rows_dtype)
        self._sample = Sample(0)
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def local_softmax(self, weight_RD: Tensor, sample: Sample, batch: Embeddings) -> LocalSoftmax:
        """Phase 1: compute the target logits and the sums over this rank's other classes."""
        targets = Targets.of(self._margin, self._scale, weight_RD, sample, batch)
        known_target_G = None
        if batch.known_cos_G is not None:
            norm_G = torch.linalg.vector_norm(batch.emb_GD, dim=1)
            known_target_G = self._margin.target(batch.known_cos_G.to(norm_G.dtype), norm_G).logit_G
        scaled_unit_GD = (targets.unit_GD * self._scale).to(self._product.dtype)
        others = _Others(
            scaled_unit_GD,
            batch.target_position_G,
            self._margin,
            self._scale,
            self._filter,
            known_target_G,
            self._product,
        )
        sums = _Sums(others, batch.emb_GD)
        for start, rows in sample.tiles(self._tile_of(scaled_unit_GD, sample)):
            sums.add(unit(weight_RD[rows])[0].to(self._product.dtype), start)
        return LocalSoftmax(sums.lse(), targets.logit_G, targets, others, sums, sample)

    @torch.no_grad()
    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, loss_weight_G: Tensor) -> Tensor:
        """Phase 2: return the gradient [G, D] of sum_i loss_weight_i (lse_i - target_i + penalty_i).

        The gradient is this rank's part. `lse_G` is over the classes of all ranks. The penalty is counted on
        the rank of the target. The micro-batch is stored for phase 3.
        """
        residual_G = local.targets.residual(lse_G) * loss_weight_G
        self._sample = local.sample
        self._batches.append(_Batch(local.others, lse_G - loss_weight_G.log(), residual_G))
        others_grad_GD = local.sums.weighted_sum_GD * (local.sums.max_G - lse_G).exp()[:, None]
        return local.targets.embedding_gradient(others_grad_GD, lse_G, loss_weight_G)

    @torch.no_grad()
    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        """Phase 3: yield (rows, gradient [T, D] of these rows) of every tile, then drop the micro-batches.

        The gradient is summed over all stored micro-batches. The caller may update the rows of a
        tile as soon as they are yielded.
        """
        batches = self._batches
        self.forget()
        assert batches, "a step needs a batch"
        largest = max(batches, key=lambda batch: len(batch.offset_G)).others.scaled_unit_GD
        for start, rows in self._sample.tiles(self._tile_of(largest, self._sample)):
            yield rows, self._gradient(weight_RD[rows], start, batches)

    def forget(self) -> None:
        """Drop the stored micro-batches."""
        self._batches = []

    def _gradient(self, weight_TD: Tensor, start: int, batches: list[_Batch]) -> Tensor:
        """Return the gradient [T, D] of the rows of the tile at position `start`, summed over `batches`.

        It is finite if the losses and the embedding gradients are: its factors are probabilities, slopes that
        the embedding gradients contain too, unit vectors, and the inverse norms of the rows.
        """
        class_unit_TD, inverse_norm_T = unit(weight_TD)
        factor_TD = class_unit_TD.to(self._product.dtype)
        grad_TD = batches[0].gradient(factor_TD, start)
        for batch in batches[1:]:
            grad_TD += batch.gradient(factor_TD, start)
        return through_unit(grad_TD, class_unit_TD, inverse_norm_T)

    def _tile_of(self, batch_GD: Tensor, sample: Sample) -> int:
        """Return the classes per tile: as configured, or a multiple of 64 that fits the device's memory."""
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
    """Set table[i, column_i] = value_i in place where the column exists."""
    # Without boolean indexing, which would synchronise with the GPU.
    last = table_GT.shape[1] - 1
    index_G1 = column_G.clamp(0, last)[:, None]
    inside_G1 = index_G1 == column_G[:, None]
    table_GT.scatter_(1, index_G1, torch.where(inside_G1, value_G[:, None], table_GT.gather(1, index_G1)))
