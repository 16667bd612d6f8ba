"""One training step: forward and backward passes over all micro-batches, then one update.

  images_BCHW -> backbone -> emb_BLD -> gather -> emb_GLD -> head -> grad_GN -> scatter -> grad_BN -> backbone

Each image has L embeddings: the fused one and one per branch. The head processes them one after the other,
each with its share of the loss. Concatenated they have N = L x D numbers. After the last micro-batch both
optimizers update the weights once, or neither of them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline import philox
from data_pipeline.batch import Batch
from partial_fc import collectives
from partial_fc.head import LabelError, PartialFC
from trainer.engine import Engine

_DROPOUT_STREAM = 3


class Outcome(NamedTuple):
    """The outcome of a step, the same on all ranks.

    loss: the mean over all samples of all ranks. is_skipped: True if no weight was updated. signal: the
    highest signal number that any rank had received before the step, 0 if none.
    """

    loss: torch.Tensor
    is_skipped: bool
    signal: int


def train_step(
    engine: Engine,
    head: PartialFC,
    batches: Iterable[Batch],
    *,
    step: int,
    label_N: torch.Tensor | None,
    accumulation: int,
    learning_rate: float,
    signal: int = 0,
    group: dist.ProcessGroup,
) -> Outcome:
    """Train on `accumulation` micro-batches.

    label_N: the labels of the whole step on all ranks; required only by a head that samples classes.
    signal: the signal that this rank has received; the outcome holds the highest of all ranks.

    Raises ValueError, naming the sample, for a label outside the classes.
    """
    engine.train()
    head.begin_step(step, label_N)
    loss = torch.zeros((), device=engine.device)
    norms = []
    for number, batch in enumerate(batches):
        features = engine.forward(batch.images_BCHW)
        emb_BLD = features.loss_inputs()
        # The signal travels with the norms, so that it needs no collective of its own.
        norm_BK1 = torch.nn.functional.pad(features.norm_BK, (0, 1), value=signal)
        gathered = collectives.gather(emb_BLD.flatten(1), batch.label_B, norm_BK1, group)
        emb_GLD = gathered.emb_GD.unflatten(1, emb_BLD.shape[1:])
        shares = [share / accumulation for share in engine.model.loss_shares]
        try:
            micro_loss, grad_GN = _head_loss(head, emb_GLD, gathered.label_G, shares)
        except LabelError as error:
            # The gathered rows follow the order of the run's samples.
            sample = (step * accumulation + number) * len(gathered.label_G) + error.row
            raise ValueError(f"sample {sample}, in step {step}, {error.problem}") from error
        grad_BN = collectives.scatter(grad_GN, group)
        engine.backward(emb_BLD.flatten(1), grad_BN, features.penalty, share=1 / accumulation)
        loss += micro_loss
        norms.append(gathered.norm_GK)
    norm_GK1 = torch.cat(norms)
    # Non-finite values need no extra collective. The loss is the same on all ranks, and a non-finite loss
    # makes the head's gradient non-finite. A non-finite gradient on one rank makes the average over the
    # ranks non-finite, and the engine checks that average on every rank.
    is_done = engine.step(learning_rate)
    # The engine has synchronized with the device and the head has queued no work since: this read is cheap.
    agreed_signal = int(norm_GK1[:, -1].max())
    if not is_done:
        head.skip_step()
        return Outcome(loss, True, agreed_signal)
    head.step(learning_rate)
    engine.model.update_statistics(norm_GK1[:, :-1])
    return Outcome(loss, False, agreed_signal)


def _head_loss(
    head: PartialFC, emb_GLD: torch.Tensor, label_G: torch.Tensor, shares: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss over all L embeddings of each image, weighted by `shares`, and its gradient [G, N]."""
    losses, grads = [], []
    for emb_GD, share in zip(emb_GLD.unbind(1), shares, strict=True):
        loss, grad_GD = head.forward_backward(emb_GD, label_G, share=share)
        losses.append(share * loss)
        grads.append(grad_GD)
    return torch.stack(losses).sum(), torch.cat(grads, dim=1)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the step's dropout masks a function of (seed, step, rank)."""
    high, low, *_ = philox.words(seed, np.array([step]), _DROPOUT_STREAM << 32 | rank)[:, 0].tolist()
    torch.manual_seed(high << 32 | low)
