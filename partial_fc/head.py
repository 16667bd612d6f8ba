"""The classifier of all identities, sharded over the ranks: it owns the class rows and orders the parts.

One training step is A micro-batches and one update:
    for each: collectives.gather -> forward_backward -> collectives.scatter -> backbone's backward
    then:     step
`forward_backward` works with the rows as they are and remembers the batch; `step` finds the weight gradient
of all batches remembered, tile by tile, and moves each tile's rows at once. So A micro-batches give what
their concatenation would, to rounding, and a gradient of the size of the weight exists at no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partial_fc import collectives, margin, partition
from partial_fc.config import HeadConfig
from partial_fc.dense import Dense
from partial_fc.optim import RowSGD
from partial_fc.streaming import Streaming

IGNORE = -1
_INITIAL_STD = 0.01
_BLOCK = 1024


class MarginSoftmax(Protocol):
    """The seam between the head and its backends; `streaming.Streaming` says what the three phases do."""

    def local_softmax(self, weight_RD: Tensor, emb_GD: Tensor, label_G: Tensor) -> Any:
        """Anything with `lse_G` and `target_G`, for the next phase."""
        ...

    def embedding_gradient(self, local: Any, lse_G: Tensor, row_weight_G: Tensor) -> Tensor: ...

    def weight_gradients(self, weight_RD: Tensor) -> Iterator[tuple[slice, Tensor]]: ...


class PartialFC:
    """Margin softmax over `num_classes` identities, of which each rank of `group` owns a range.

    `weight_RD` [classes of this rank, embedding_size] starts as normal numbers of standard deviation 0.01
    that depend on (seed, class) alone, so on no world size. `dtype` is that of rows, moments and arithmetic.
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
                f"a head of {num_classes} classes and embedding size {embedding_size}: "
                "expected at least 1 of each"
            )
        self.num_classes = num_classes
        self.classes = partition.class_range(num_classes, *collectives.rank_and_size(group))
        self.weight_RD = torch.empty(len(self.classes), embedding_size, dtype=dtype, device=device)
        _fill_initial(self.weight_RD, self.classes, seed)
        self._optimizer = RowSGD(self.weight_RD, config.momentum, config.weight_decay)
        self._softmax = _softmax(config)
        self._group = group

    @torch.no_grad()
    def forward_backward(
        self, emb_GD: Tensor, label_G: Tensor, *, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Loss and embedding gradient of one gathered micro-batch, the same batch on all ranks.

        emb_GD: [G, D], not normalised. label_G: int64 [G], classes, or -1 for rows to be ignored, which add
        neither loss nor gradient. share: the micro-batch's part in the step, 1 / A.

        Returns the mean loss over the counted rows of this micro-batch (a scalar, equal on all ranks, not
        times `share`), and d(share * loss) / d(emb_GD), summed over the classes of *this* rank only:
        `collectives.scatter` completes it. Both in the head's dtype. An embedding of zeros has no gradient.

        The step's loss is the sum of share * loss over its micro-batches, each averaged over its own counted
        rows. With a different number of ignored rows in each, a row in a micro-batch that ignores many
        weighs more than it would in one large batch; without any counted row, loss and gradient are 0.

        Raises ValueError for shapes and types other than these and, naming the row, for a label out of range.
        """
        self._check(emb_GD, label_G)
        is_counted_G = label_G != IGNORE
        counted = is_counted_G.sum(dtype=torch.float64).clamp(min=1)
        # Zeros instead of what an ignored row holds, so that not even a NaN in it can spread.
        emb_GD = emb_GD.to(self.weight_RD.dtype).masked_fill(~is_counted_G[:, None], 0)
        local = self._softmax.local_softmax(self.weight_RD, emb_GD, self._row_of(label_G))
        lse_G, target_G = collectives.reduce_softmax(
            local.lse_G.detach(), local.target_G.detach(), self._group
        )
        loss = ((lse_G - target_G) * is_counted_G).sum() / counted
        row_weight_G = (is_counted_G * (share / counted)).to(emb_GD.dtype)
        grad_GD = self._softmax.embedding_gradient(local, lse_G.to(emb_GD.dtype), row_weight_G)
        return loss.to(emb_GD.dtype), grad_GD

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move this rank's rows by the gradient of all micro-batches since the last step; forget these."""
        for rows, grad_TD in self._softmax.weight_gradients(self.weight_RD):
            self._optimizer.update(rows, grad_TD, learning_rate)

    def logical_state(self) -> dict[str, Tensor]:
        """`weight` and `momentum`, each as the one [C, D] tensor of all ranks, on the live memory.

        DTensors where there is a group: torch.distributed.checkpoint saves them, and loads them in place
        from what any other number of ranks has saved.
        """
        local = {"weight": self.weight_RD, **self._optimizer.state}
        return {
            name: collectives.logical(rows, self.num_classes, self._group) for name, rows in local.items()
        }

    def _row_of(self, label_G: Tensor) -> Tensor:
        """The row of each label in this rank's shard, -1 where it is on another rank or ignored."""
        is_here_G = (label_G >= self.classes.start) & (label_G < self.classes.stop)
        return torch.where(is_here_G, label_G - self.classes.start, -1)

    def _check(self, emb_GD: Tensor, label_G: Tensor) -> None:
        width = self.weight_RD.shape[1]
        if emb_GD.shape != (len(label_G), width) or label_G.ndim != 1 or label_G.dtype != torch.int64:
            raise ValueError(
                f"expected embeddings [G, {width}] and int64 labels [G], found embeddings "
                f"{list(emb_GD.shape)} and {label_G.dtype} labels {list(label_G.shape)}"
            )
        # Every rank sees the same labels, so all raise or none: nobody is left waiting in a collective.
        is_bad_G = (label_G < IGNORE) | (label_G >= self.num_classes)
        if is_bad_G.any():
            row = int(is_bad_G.nonzero()[0])
            raise ValueError(
                f"row {row} of the gathered batch has label {int(label_G[row])}: expected 0 to "
                f"{self.num_classes - 1}, or {IGNORE} to ignore the row; correct the labels or num_classes"
            )


def _softmax(config: HeadConfig) -> MarginSoftmax:
    chosen = margin.build(config.margin)
    if config.backend == "dense":
        return Dense(chosen, config.scale)
    return Streaming(chosen, config.scale, config.tile)


def _fill_initial(weight_RD: Tensor, classes: range, seed: int) -> None:
    """Fill the rows of `classes` with normal numbers, each row a function of (seed, class).

    Philox keyed by the seed, its counter's high word the block of classes: one call makes a block, and a
    block that is shared with a neighbour rank is made by both.
    """
    width = weight_RD.shape[1]
    for block in range(classes.start // _BLOCK, -(-classes.stop // _BLOCK)):
        dice = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, block]))
        block_ND = torch.from_numpy(dice.standard_normal((_BLOCK, width), np.float32)) * _INITIAL_STD
        ours = slice(max(block * _BLOCK, classes.start), min((block + 1) * _BLOCK, classes.stop))
        weight_RD[_shifted(ours, classes.start)] = block_ND[_shifted(ours, block * _BLOCK)]


def _shifted(ids: slice, origin: int) -> slice:
    return slice(ids.start - origin, ids.stop - origin)
