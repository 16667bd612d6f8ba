"""The margin softmax in Triton, for GPUs: the three phases of `streaming` over larger tiles.

Phases 1 and 3 launch per tile (G rows, T classes in a tile, D the embedding size):
    1. _unit_rows        weight rows, sampled or all -> unit rows [T, D] in the matrix dtype
       _exponentials     x w^T fused with scale, filter, target, exponential and the sums of rows -> [G, T]
       Products          [G, T] x [T, D]: the weighted sum of unit rows, later the embedding gradient
    3. _unit_rows, _exponentials again as p = exp(logit - lse)
       Products          [T, G] x [G, D]: the gradient with respect to the unit rows
       _through_unit     projects it through the normalisation of the rows, in place
Targets are computed in plain PyTorch and float32 (`targets`), and rows are updated by `optim`.
Memory: about `_TILE_BYTES`, and D numbers of the matrix dtype for each kept row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.config import FLOAT32_MAX_SCALE
from partial_fc.margin import Margin
from partial_fc.matmul import Inputs, Products
from partial_fc.optim import Rows
from partial_fc.sampling import Sample
from partial_fc.targets import Embeddings, Targets

# A tile of this size runs long enough to hide its dozens of launches, and is small for any GPU's memory.
_TILE_BYTES = 1 << 28
_LEAST_BLOCK_T = 64
_ROW_NUMBERS = 4096
_FIXED = {"BLOCK_G": 128, "BLOCK_T": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
_LOG2_E = math.log2(math.e)


@triton.jit
def _load_rows(
    weight_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return this program's weight rows, and positions and masks of the tile's rows [T] and entries [T, D].

    If the classes are sampled, `rows_ptr` lists the row at each position; otherwise the two are equal.
    """
    position_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D = tl.arange(0, BLOCK_D)
    is_row_T = position_T < T
    inside_TD = is_row_T[:, None] & (column_D < D)[None, :]
    row_T = position_T.to(tl.int64)
    at_TD = row_T[:, None] * D + column_D[None, :]
    if SAMPLED:
        row_T = tl.load(rows_ptr + position_T, is_row_T, other=0)
    vector_TD = tl.load(weight_ptr + row_T[:, None] * D + column_D[None, :], inside_TD, other=0.0)
    return vector_TD, position_T, is_row_T, at_TD, inside_TD


@triton.jit
def _unit_rows(
    weight_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    inverse_norm_ptr: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write unit rows in the dtype of `unit_ptr`, and 1 / norm. A zero row stays zero, with 1 / norm 0."""
    vector_TD, position_T, is_row_T, at_TD, inside_TD = _load_rows(
        weight_ptr, rows_ptr, T, D, SAMPLED, BLOCK_T, BLOCK_D
    )
    norm_T = tl.sqrt(tl.sum(vector_TD * vector_TD, 1))
    inverse_norm_T = tl.where(norm_T == 0, 0.0, 1 / norm_T)
    unit_TD = (vector_TD * inverse_norm_T[:, None]).to(unit_ptr.dtype.element_ty)
    tl.store(unit_ptr + at_TD, unit_TD, inside_TD)
    tl.store(inverse_norm_ptr + position_T, inverse_norm_T, is_row_T)


@triton.jit
def _through_unit(
    grad_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    inverse_norm_ptr: tl.tensor,
    T: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Replace the gradient with respect to unit rows by `scale` times that of the rows, in place."""
    vector_TD, position_T, is_row_T, at_TD, inside_TD = _load_rows(
        weight_ptr, rows_ptr, T, D, SAMPLED, BLOCK_T, BLOCK_D
    )
    inverse_norm_T1 = tl.load(inverse_norm_ptr + position_T, is_row_T, other=0.0)[:, None]
    grad_TD = tl.load(grad_ptr + at_TD, inside_TD, other=0.0)
    unit_TD = vector_TD * inverse_norm_T1
    grad_TD -= unit_TD * tl.sum(grad_TD * unit_TD, 1)[:, None]
    tl.store(grad_ptr + at_TD, grad_TD * (inverse_norm_T1 * scale), inside_TD)


@triton.jit(do_not_specialize=["start"])
def _exponentials(
    unit_ptr: tl.tensor,
    class_unit_ptr: tl.tensor,
    label_ptr: tl.tensor,
    log2_offset_ptr: tl.tensor,
    at_target_ptr: tl.tensor,
    exp_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    G: tl.tensor,
    T: tl.tensor,
    start: tl.tensor,
    exp_stride: tl.tensor,
    log2_scale: tl.tensor,
    filter_above: tl.tensor,
    D: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write 2^(log2_scale cosine - log2_offset) [G, T], 0 where filtered out, `at_target` at the target.

    With sums, the sum over each BLOCK_T classes is added to its own line [G] of `sum_ptr` [lines, G].
    Both phases run the same code in the same blocks, so their cosines are equal bit for bit, and the filter
    excludes the same classes.
    """
    # Exponentials are written to memory, in the matrix dtype, and do not stay in registers as in flash
    # attention: a float32 accumulator [rows, 512] leaves room for blocks of 64 rows only, which need more L2
    # bandwidth than an H100 has. Written, they cost 4 bytes of traffic per logit, during products of 2048
    # FLOP per logit, and cuBLAS runs the second product at full speed and splits its long sum over the
    # processors. Calculated, not yet measured.
    # No running maximum is kept: cosines end at 1, and up to a scale of FLOAT32_MAX_SCALE float32 holds
    # exp(logit), its sum over 2^31 classes, and every term that counts beside a row's largest, even if the
    # largest logit is -scale.
    # No sum uses atomics. Only block sizes tuned by timing can change a sum's order from run to run, and
    # `deterministic` fixes them.
    blocks_G = tl.cdiv(G, BLOCK_G)
    line = tl.program_id(0) // blocks_G
    row_G = tl.program_id(0) % blocks_G * BLOCK_G + tl.arange(0, BLOCK_G)
    column_T = line * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows beyond the end read the last row again: loads need a mask over D only, or none.
    row_at_G = tl.minimum(row_G, G - 1).to(tl.int64) * D
    column_at_T = tl.minimum(column_T, T - 1).to(tl.int64) * D
    offset_D = tl.arange(0, BLOCK_D)
    left_GD = unit_ptr + row_at_G[:, None] + offset_D[None, :]
    right_DT = class_unit_ptr + column_at_T[None, :] + offset_D[:, None]
    cos_GT = tl.zeros((BLOCK_G, BLOCK_T), tl.float32)
    for done in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x_GD = tl.load(left_GD + done)
            w_DT = tl.load(right_DT + done)
        else:
            x_GD = tl.load(left_GD + done, (offset_D < D - done)[None, :], other=0.0)
            w_DT = tl.load(right_DT + done, (offset_D < D - done)[:, None], other=0.0)
        cos_GT = tl.dot(x_GD.to(DOT_TYPE), w_DT.to(DOT_TYPE), cos_GT, input_precision="tf32")

    is_row_G, is_column_T = row_G < G, column_T < T
    target_position_G = tl.load(label_ptr + row_G, is_row_G, other=-1)
    log2_offset_G = tl.load(log2_offset_ptr + row_G, is_row_G, other=0.0)
    at_target_G = tl.load(at_target_ptr + row_G, is_row_G, other=0.0)
    exp_GT = tl.exp2(cos_GT * log2_scale - log2_offset_G[:, None])
    exp_GT = tl.where(cos_GT > filter_above, 0.0, exp_GT)
    exp_GT = tl.where((start + column_T)[None, :] == target_position_G[:, None], at_target_G[:, None], exp_GT)
    at_GT = exp_ptr + row_G.to(tl.int64)[:, None] * exp_stride + column_T[None, :]
    tl.store(at_GT, exp_GT.to(exp_ptr.dtype.element_ty), is_row_G[:, None] & is_column_T[None, :])
    if WITH_SUMS:
        sum_G = tl.sum(tl.where(is_column_T[None, :], exp_GT, 0.0), 1)
        at_G = sum_ptr + line.to(tl.int64) * G + row_G
        tl.store(at_G, tl.load(at_G, is_row_G, other=0.0) + sum_G, is_row_G)


def _blocks(rows: int, classes: int, depth: int, warps: int, stages: int) -> triton.Config:
    sizes = {"BLOCK_G": rows, "BLOCK_T": classes, "BLOCK_D": depth}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


# Triton drops configurations whose buffers exceed the GPU's shared memory.
_tuned_exponentials = triton.autotune(
    configs=[
        _blocks(128, 256, 64, 8, 3),
        _blocks(256, 128, 64, 8, 3),
        _blocks(128, 128, 64, 8, 3),
        _blocks(128, 128, 32, 8, 4),
        _blocks(64, 128, 64, 4, 4),
        _blocks(64, 128, 32, 4, 4),
        _blocks(32, 128, 64, 4, 4),
        _blocks(16, _LEAST_BLOCK_T, 64, 4, 4),
    ],
    key=["G", "D"],
    restore_value=["sum_ptr"],
)(_exponentials)


@dataclass(frozen=True)
class _Rows:
    """The rows of one batch as inputs of the matrix units."""

    unit_GD: Tensor  # in the matrix dtype
    target_position_G: Tensor  # position in the sample, -1 where the target is on another rank


@dataclass(frozen=True)
class LocalSoftmax:
    """Result of phase 1 for one batch and this rank's classes, read by the other two phases."""

    others_lse_G: Tensor  # over this rank's classes except the target; -inf if there are none
    target_G: Tensor  # target logit with margin; 0 where the target is on another rank
    targets: Targets
    weighted_sum_GD: Tensor  # of exp(logit) w_j, without the targets
    rows: _Rows
    sample: Sample


@dataclass(frozen=True)
class _Batch:
    """Values of a batch that are kept until the rows are updated."""

    rows: _Rows
    log2_offset_G: Tensor  # 2^(log2 logit - offset) is the row's weight times p
    residual_G: Tensor  # d(loss) / d(target cosine) / scale: weight (p - 1) slope


class Kernels:
    """Backend in Triton; the methods are documented in `streaming.Streaming`.

    Weights are float32; `matrix_inputs` is the dtype of the matrix units' inputs, and they sum in float32.
    Margins that modify negatives and scales above `FLOAT32_MAX_SCALE` are not supported.
    """

    def __init__(
        self,
        margin: Margin,
        scale: float,
        interclass_filter: float | None,
        tile: int | None,
        matrix_inputs: Inputs,
        deterministic: bool,
    ) -> None:
        assert not margin.modifies_negatives
        assert scale <= FLOAT32_MAX_SCALE
        assert matrix_inputs != "fp32"
        self._margin = margin
        self._scale = scale
        self._filter_above = math.inf if interclass_filter is None else interclass_filter
        self._tile = tile
        self._product = Products(matrix_inputs, torch.float32)
        self._deterministic = deterministic
        self._sample = Sample(0)
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def local_softmax(self, weight_RD: Tensor, sample: Sample, batch: Embeddings) -> LocalSoftmax:
        assert batch.known_cos_G is None
        targets = Targets.of(self._margin, self._scale, weight_RD, sample, batch)
        rows = _Rows(targets.unit_GD.to(self._product.dtype).contiguous(), batch.target_position_G)
        sum_G, weighted_sum_GD = self._sums_of_others(weight_RD, sample, rows)
        return LocalSoftmax(sum_G.log(), targets.logit_G, targets, weighted_sum_GD, rows, sample)

    @torch.no_grad()
    def embedding_gradient(self, local: LocalSoftmax, lse_G: Tensor, loss_weight_G: Tensor) -> Tensor:
        residual_G = local.targets.residual(lse_G) * loss_weight_G
        log2_offset_G = (lse_G - loss_weight_G.log()) * _LOG2_E
        self._sample = local.sample
        self._batches.append(_Batch(local.rows, log2_offset_G, residual_G))
        others_grad_GD = local.weighted_sum_GD * (-lse_G).exp()[:, None]
        return local.targets.embedding_gradient(others_grad_GD, lse_G, loss_weight_G)

    @torch.no_grad()
    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        batches, sample = self._batches, self._sample
        self.forget()
        assert batches, "a step needs a batch"
        most = max(len(batch.residual_G) for batch in batches)
        for start, rows in sample.tiles(self._tile_of(most, weight_RD)):
            tile = _Tile(weight_RD, rows, self._product.dtype)
            for batch in batches:
                p_GT = self._exponentials(
                    tile, start, batch.rows, batch.log2_offset_G, batch.residual_G, None
                )
                tile.add_gradient(self._product(p_GT.T, batch.rows.unit_GD))
            yield rows, tile.gradient(self._scale)

    def forget(self) -> None:
        """Drop the kept batches."""
        self._batches = []

    def _sums_of_others(self, weight_RD: Tensor, sample: Sample, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return the sums over all classes but the target: of exp(logit) [G] and of exp(logit) w_j [G, D]."""
        count = len(rows.target_position_G)
        most = self._tile_of(count, weight_RD)
        lines = triton.cdiv(min(most, len(sample)), _LEAST_BLOCK_T)
        sum_LG = weight_RD.new_zeros(lines, count)
        weighted_sum_GD = weight_RD.new_zeros(count, weight_RD.shape[1])
        zero_G = weight_RD.new_zeros(count)
        for start, picked in sample.tiles(most):
            tile = _Tile(weight_RD, picked, self._product.dtype)
            exp_GT = self._exponentials(tile, start, rows, zero_G, zero_G, sum_LG)
            weighted_sum_GD += self._product(exp_GT, tile.unit_TD)
        return sum_LG.sum(0), weighted_sum_GD

    def _exponentials(
        self,
        tile: _Tile,
        start: int,
        rows: _Rows,
        log2_offset_G: Tensor,
        at_target_G: Tensor,
        sum_LG: Tensor | None,
    ) -> Tensor:
        (G, D), T = rows.unit_GD.shape, len(tile.unit_TD)
        # Each line is padded to 64 entries, so that it is aligned for the wide loads of the matrix units.
        exp_GT = rows.unit_GD.new_empty(G, triton.cdiv(T, 64) * 64)[:, :T]
        arguments = (
            *(rows.unit_GD, tile.unit_TD, rows.target_position_G, log2_offset_G, at_target_G, exp_GT),
            # Without sums a placeholder, never accessed; its dtype is part of the autotuner's cache key.
            log2_offset_G if sum_LG is None else sum_LG,
            *(G, T, start, exp_GT.stride(0), self._scale * _LOG2_E, self._filter_above),
        )
        options = {
            "D": D,
            "WITH_SUMS": sum_LG is not None,
            # Triton's interpreter multiplies the bits of bf16 as integers.
            "DOT_TYPE": tl.bfloat16 if exp_GT.is_cuda and exp_GT.dtype == torch.bfloat16 else tl.float32,
        }

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(G, meta["BLOCK_G"]) * triton.cdiv(T, meta["BLOCK_T"]),)

        if exp_GT.is_cuda and not self._deterministic:
            _tuned_exponentials[grid](*arguments, **options)
        else:
            _exponentials[grid](*arguments, **options, **_FIXED)
        return exp_GT

    def _tile_of(self, rows: int, weight_RD: Tensor) -> int:
        """Return the classes per tile; by default a multiple of 128 whose buffers take `_TILE_BYTES`."""
        matrix_bytes, width = self._product.dtype.itemsize, weight_RD.shape[1]
        # Exponentials and unit rows, then the gradient and the optimizer's temporaries.
        bytes_per_class = matrix_bytes * (rows + width) + 4 * 3 * width
        return self._tile or max(1, _TILE_BYTES // bytes_per_class // 128) * 128


class _Tile:
    """Some rows of the weight as unit rows, and the gradient with respect to them.

    Unit rows are computed once per tile: inside `_exponentials`, G / 128 programs would each normalise and
    round the same rows.
    """

    def __init__(self, weight_RD: Tensor, rows: Rows, matrix_type: torch.dtype) -> None:
        self._is_sampled = isinstance(rows, Tensor)
        self._weight = weight_RD if isinstance(rows, Tensor) else weight_RD[rows]
        self._rows = rows if isinstance(rows, Tensor) else weight_RD
        count = len(rows) if isinstance(rows, Tensor) else len(self._weight)
        self.unit_TD = weight_RD.new_empty(count, weight_RD.shape[1], dtype=matrix_type)
        self._inverse_norm_T = weight_RD.new_empty(count)
        self._grad_TD: Tensor | None = None
        self._launch(_unit_rows, self._weight, self._rows, self.unit_TD, self._inverse_norm_T, count)

    def add_gradient(self, grad_TD: Tensor) -> None:
        """Add a gradient with respect to the unit rows, divided by scale; the first is kept uncopied."""
        self._grad_TD = grad_TD if self._grad_TD is None else self._grad_TD.add_(grad_TD)

    def gradient(self, scale: float) -> Tensor:
        """Return the gradient with respect to the rows."""
        assert self._grad_TD is not None
        pointers = (self._grad_TD, self._weight, self._rows, self._inverse_norm_T)
        self._launch(_through_unit, *pointers, len(self.unit_TD), scale)
        return self._grad_TD

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        count, width = self.unit_TD.shape
        padded = triton.next_power_of_2(width)
        block = max(1, _ROW_NUMBERS // padded)
        kernel[(triton.cdiv(count, block),)](
            *arguments, D=width, SAMPLED=self._is_sampled, BLOCK_T=block, BLOCK_D=padded
        )
