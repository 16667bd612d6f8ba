"""The margin-softmax classifier over all identities, sharded over the ranks.

One training step is A micro-batches and one update:
    first:    begin_step
    for each: collectives.gather -> forward_backward -> collectives.scatter -> backbone's backward
    then:     step, or skip_step after non-finite values
`forward_backward` keeps the batch; `step` computes the weight gradient of all kept batches tile by tile and
updates each tile's rows at once. No gradient of the size of the weight is ever allocated.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partial_fc import collectives, partition, sampling
from partial_fc.config import FLOAT32_MAX_SCALE, HeadConfig
from partial_fc.dense import Dense
from partial_fc.margin import Margin
from partial_fc.optim import Rows
from partial_fc.sampling import Sample
from partial_fc.streaming import Streaming
from partial_fc.targets import Embeddings, target_units, unit

IGNORE = -1
_INITIAL_STD = 0.01
_BLOCK = 1024


class MarginSoftmax(Protocol):
    """Interface between the head and its backends; `streaming.Streaming` documents the three phases."""

    def local_softmax(self, weight_RD: Tensor, sample: Sample, batch: Embeddings) -> Any:
        """Return an object with `others_lse_G` and `target_G`, passed on to the next phase."""
        ...

    def embedding_gradient(self, local: Any, lse_G: Tensor, loss_weight_G: Tensor) -> Tensor: ...

    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[Rows, Tensor]]: ...

    def forget(self) -> None: ...


class _Observed(NamedTuple):
    """Values of one micro-batch that update the margin's running statistics at the end of the step."""

    cos_G: Tensor
    norm_G: Tensor
    is_counted_G: Tensor


class LabelError(ValueError):
    """Invalid label: its `row` in the gathered batch and the `problem`."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row} of the gathered batch {problem}")
        self.row, self.problem = row, problem


class PartialFC:
    """Margin softmax over `num_classes` identities; each rank of `group` owns a range of them.

    `weight_RD` [classes of this rank, embedding_size] is drawn from a normal distribution with standard
    deviation 0.01. The draw is a function of (seed, class) alone, so it is the same for any world size.
    `dtype` is the dtype of rows, moments and arithmetic.
    """

    def __init__(
        self,
        config: HeadConfig,
        *,
        num_classes: int,
        embedding_size: int,
        seed: int,
        group: ProcessGroup | None,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_classes < 1 or embedding_size < 1:
            raise ValueError(
                f"expected at least 1 class and embedding size 1, found {num_classes} classes and "
                f"embedding size {embedding_size}"
            )
        self.num_classes = num_classes
        self.classes = partition.class_range(num_classes, *collectives.rank_and_size(group))
        shape = len(self.classes), embedding_size
        try:
            self.weight_RD = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            size_gb = dtype.itemsize * shape[0] * shape[1] / 1e9
            raise ValueError(
                f"expected {size_gb:.1f} GB of memory for this rank's class rows, {shape}, found too little; "
                f"correct the labels if there are not {num_classes:,} classes, or use more ranks"
            ) from error
        _fill_initial(self.weight_RD, self.classes, seed)
        self._optimizer = config.optimizer.build(self.weight_RD)
        self._margin = config.margin.build(device)
        self._softmax = _softmax(config, self._margin, self.weight_RD)
        self._sample_rate, self._seed = config.sample_rate, seed
        self.is_sampled = config.sample_rate < 1
        self._sample = Sample(len(self.classes)) if config.sample_rate == 1 else None
        self._label_N: Tensor | None = None
        self._observed: list[_Observed] = []
        self._group = group

    @torch.no_grad()
    def begin_step(self, step: int, label_N: Tensor | None) -> None:
        """Start step number `step` and select the classes that take part in it.

        label_N: int64, the labels of all samples of the step: of all ranks and all micro-batches, in any
        order; -1 marks an ignored row. The labels' classes take part, and so do the classes drawn by a hash
        of (seed, step, class). The set is the same on any number of ranks. Without sampling all classes take
        part, and label_N is unused and may be None.
        """
        # The whole step's labels are needed: classes of the last micro-batch are negatives of the first.
        if self._sample_rate < 1:
            assert label_N is not None, "sampling needs the labels of the step"
            self._label_N = label_N.to(self.weight_RD.device)
            self._sample = sampling.draw(self._sample_rate, self._seed, step, self.classes, self._label_N)

    @torch.no_grad()
    def forward_backward(
        self, emb_GD: Tensor, label_G: Tensor, *, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return loss and embedding gradient of one gathered micro-batch, which is the same on all ranks.

        emb_GD: [G, D], not normalised. label_G: int64 [G], classes; rows with label -1 are ignored and
        contribute neither loss nor gradient. share: the micro-batch's weight in the step, 1 / A.

        Returns the mean loss over the counted rows of this micro-batch (a scalar, equal on all ranks, not
        multiplied by `share`) and d(share * loss) / d(emb_GD), summed over the classes of *this* rank only:
        `collectives.scatter` completes the sum. Both are in the head's dtype. A zero embedding has no
        gradient. If the loss is non-finite, so is every entry of the gradient: callers check only one.

        The step's loss is the sum of share * loss over its micro-batches, each averaged over its own counted
        rows. If the micro-batches have different numbers of ignored rows, a row in a micro-batch with many
        of them weighs more than in one large batch. Without any counted row, loss and gradient are 0.

        Raises ValueError for other shapes or dtypes. Raises LabelError, which names the row, for a label that
        is out of range or was not passed to `begin_step`.
        """
        self._check(emb_GD, label_G)
        assert self._sample is not None, "begin_step has to be called first"
        is_counted_G = label_G != IGNORE
        counted = is_counted_G.sum(dtype=torch.float64).clamp(min=1)
        # Ignored rows are set to zero, so that a NaN in one of them cannot propagate.
        emb_GD = emb_GD.to(self.weight_RD.dtype).masked_fill(~is_counted_G[:, None], 0)
        position_G = self._sample.position_of(self._row_of(label_G))
        norm_G, cos_G = torch.linalg.vector_norm(emb_GD, dim=1), None
        if self._margin.modifies_negatives:
            cos_G = collectives.reduce_targets(self._target_cosines(emb_GD, position_G), self._group)
        batch = Embeddings(emb_GD, position_G, cos_G)
        local = self._softmax.local_softmax(self.weight_RD, self._sample, batch)
        others_lse_G, target_G = collectives.reduce_softmax(
            local.others_lse_G.detach(), local.target_G.detach(), self._group
        )
        lse_G = torch.logaddexp(others_lse_G, target_G)
        loss_G = lse_G - target_G
        penalty = self._margin.penalty(norm_G)
        if penalty is not None:
            loss_G = loss_G + penalty[0]
        loss = (loss_G * is_counted_G).sum() / counted
        loss_weight_G = (is_counted_G * (share / counted)).to(emb_GD.dtype)
        grad_GD = self._softmax.embedding_gradient(local, lse_G.to(emb_GD.dtype), loss_weight_G)
        if self._margin.state:
            cos_G = torch.zeros_like(norm_G) if cos_G is None else cos_G
            self._observed.append(_Observed(cos_G, norm_G, is_counted_G))
        return loss.to(emb_GD.dtype), grad_GD + (0 * loss).to(emb_GD.dtype)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update this rank's rows by the gradient of all micro-batches since the last step; drop these.

        To rounding, the result is that of one batch with all their rows.
        """
        for rows, grad_TD in self._softmax.weight_gradients(self.weight_RD):
            self._optimizer.update(rows, grad_TD, learning_rate)
        if self._observed:
            self._margin.observe(*(torch.cat(parts) for parts in zip(*self._observed, strict=True)))
        self._end_step()

    def skip_step(self) -> None:
        """Drop all micro-batches since the last step; rows, moments and statistics stay unchanged."""
        self._softmax.forget()
        self._end_step()

    def logical_state(self) -> dict[str, Tensor]:
        """Return `weight` and moments, each as one tensor over all C classes, and the margin's statistics.

        The tensors share memory with the head. With a group they are DTensors: torch.distributed.checkpoint
        saves them and loads them in place from a checkpoint of any number of ranks.
        """
        local = {"weight": self.weight_RD, **self._optimizer.state}
        return {
            **{
                name: collectives.logical(rows, self.num_classes, self._group) for name, rows in local.items()
            },
            **{f"margin_{name}": value for name, value in self._margin.state.items()},
        }

    def _end_step(self) -> None:
        self._observed = []
        if self._sample_rate < 1:
            self._sample = self._label_N = None

    def _target_cosines(self, emb_GD: Tensor, position_G: Tensor) -> Tensor:
        """Return the target cosines; 0 for rows whose target is on another rank."""
        assert self._sample is not None
        target_unit_GD = target_units(self.weight_RD, self._sample, position_G)
        return (unit(emb_GD)[0] * target_unit_GD).sum(1).where(position_G >= 0, 0)

    def _row_of(self, label_G: Tensor) -> Tensor:
        """Return the row of each label in this rank's shard, -1 where it is on another rank or ignored."""
        is_here_G = (label_G >= self.classes.start) & (label_G < self.classes.stop)
        return torch.where(is_here_G, label_G - self.classes.start, -1)

    def _check(self, emb_GD: Tensor, label_G: Tensor) -> None:
        width = self.weight_RD.shape[1]
        if emb_GD.shape != (len(label_G), width) or label_G.ndim != 1 or label_G.dtype != torch.int64:
            raise ValueError(
                f"expected embeddings [G, {width}] and int64 labels [G], found embeddings "
                f"{list(emb_GD.shape)} and {label_G.dtype} labels {list(label_G.shape)}"
            )
        # Every rank checks the same labels, so all ranks raise or none: no rank hangs in a collective.
        _refuse(
            (label_G < IGNORE) | (label_G >= self.num_classes),
            label_G,
            f"expected 0 to {self.num_classes - 1}, or {IGNORE} to ignore the row; "
            "correct the labels or num_classes",
        )
        if self._label_N is not None:
            _refuse(
                (label_G != IGNORE) & ~torch.isin(label_G, self._label_N),
                label_G,
                f"expected one of the {len(self._label_N)} labels that were passed to begin_step",
            )


def _refuse(is_bad_G: Tensor, label_G: Tensor, problem: str) -> None:
    if is_bad_G.any():
        row = int(is_bad_G.nonzero()[0])
        raise LabelError(row, f"has label {int(label_G[row])}: {problem}")


def _softmax(config: HeadConfig, chosen: Margin, weight_RD: Tensor) -> MarginSoftmax:
    inputs = config.matrix_inputs
    if config.backend == "dense":
        if inputs not in ("auto", "fp32"):
            raise ValueError(f"backend = dense: expected matrix_inputs = auto or fp32, found {inputs}")
        return Dense(chosen, config.scale, config.interclass_filter)
    common = (chosen, config.scale, config.interclass_filter, config.tile)
    if config.backend == "kernels" or (config.backend == "auto" and weight_RD.is_cuda):
        obstacle = _obstacle_to_kernels(config, chosen, weight_RD)
        if obstacle is None:
            from partial_fc.kernels import Kernels  # needs Triton, an optional package

            return Kernels(*common, "bf16" if inputs == "auto" else inputs, config.deterministic)
        if config.backend == "kernels":
            raise ValueError(f"backend = kernels: expected {obstacle}; change that, or set backend = auto")
    return Streaming(*common, "fp32" if inputs == "auto" else inputs, weight_RD.dtype)


def _obstacle_to_kernels(config: HeadConfig, chosen: Margin, weight_RD: Tensor) -> str | None:
    """Return the unmet requirement of `kernels` and the value found; None if it can be used."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton, found none"
    if weight_RD.is_cuda:
        capability = torch.cuda.get_device_capability(weight_RD.device)
        if capability < (8, 0):
            return f"a GPU of compute capability 8.0 or more, found {capability[0]}.{capability[1]}"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return f"a GPU (or TRITON_INTERPRET=1, to test), found device {weight_RD.device}"
    if weight_RD.dtype != torch.float32:
        return f"rows of torch.float32, found {weight_RD.dtype}"
    if config.matrix_inputs == "fp32":
        return "matrix_inputs = bf16 or tf32, found fp32"
    if chosen.modifies_negatives:
        return f"a margin that does not modify negatives, found {config.margin.kind}"
    if config.scale > FLOAT32_MAX_SCALE:
        return f"scale <= {FLOAT32_MAX_SCALE:g}, where exp(logit) fits float32, found {config.scale:g}"
    return None


def _fill_initial(weight_RD: Tensor, classes: range, seed: int) -> None:
    """Fill the rows of `classes` with normal numbers; each row is a function of (seed, class).

    The generator is Philox, keyed by the seed, with the block of classes as the counter's high word. One call
    draws a block. Two ranks whose ranges meet inside a block both draw it.
    """
    width = weight_RD.shape[1]
    for block in range(classes.start // _BLOCK, -(-classes.stop // _BLOCK)):
        dice = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, block]))
        block_ND = torch.from_numpy(dice.standard_normal((_BLOCK, width), np.float32)) * _INITIAL_STD
        ours = slice(max(block * _BLOCK, classes.start), min((block + 1) * _BLOCK, classes.stop))
        weight_RD[_shifted(ours, classes.start)] = block_ND[_shifted(ours, block * _BLOCK)]


def _shifted(ids: slice, origin: int) -> slice:
    return slice(ids.start - origin, ids.stop - origin)
