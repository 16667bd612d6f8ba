"""One training step, in the order in which a batch goes through the rooms.

  images_BCHW -> backbone -> emb_BLD -> gather -> emb_GLD -> head -> grad_GN -> scatter -> grad_BN -> backbone

L embeddings of each image, its own and those that the branches alone make, come before the head one after the
other, each with its share of the loss; side by side they are N = L x D numbers.

A step is as many rounds of this as there are micro-batches; then both optimizers move, once, or neither does.
What is not finite on one rank is agreed on without a message of its own: a loss is the same on all ranks and
spoils the gradient that leaves the head, a bad gradient of one rank spoils its backbone's, and that spoils
the average over the ranks, which the engine looks at on all of them. So is a signal to stop, which travels
with the norms.
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
    """The mean loss over all samples of all ranks, whether the step was skipped, and the gravest signal that
    a rank had had when the step began, 0 if none; alike on all ranks."""

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

    label_N: the labels of the whole step, of all ranks; only a head that samples classes needs them.
    signal: of this rank; the outcome has that of all ranks.

    Raises ValueError, naming the sample, for a label outside the classes.
    """
    engine.train()
    head.begin_step(step, label_N)
    loss = torch.zeros((), device=engine.device)
    norms = []
    for number, batch in enumerate(batches):
        features = engine.forward(batch.images_BCHW)
        emb_BLD = features.judged()
        norm_BK1 = torch.nn.functional.pad(features.norm_BK, (0, 1), value=signal)
        gathered = collectives.gather(emb_BLD.flatten(1), batch.label_B, norm_BK1, group)
        emb_GLD = gathered.emb_GD.unflatten(1, emb_BLD.shape[1:])
        shares = [share / accumulation for share in engine.model.loss_shares]
        try:
            micro_loss, grad_GN = _judge(head, emb_GLD, gathered.label_G, shares)
        except LabelError as error:
            # Ranks and micro-batches are gathered in the order of the run's samples.
            sample = (step * accumulation + number) * len(gathered.label_G) + error.row
            raise ValueError(f"sample {sample}, in step {step}, {error.problem}") from error
        grad_BN = collectives.scatter(grad_GN, group)
        engine.backward(emb_BLD.flatten(1), grad_BN, features.penalty, share=1 / accumulation)
        loss += micro_loss
        norms.append(gathered.norm_GK)
    norm_GK1 = torch.cat(norms)
    is_done = engine.step(learning_rate)
    # The engine has waited for the device already, and the head not yet kept it busy.
    agreed_signal = int(norm_GK1[:, -1].max())
    if not is_done:
        head.skip_step()
        return Outcome(loss, True, agreed_signal)
    head.step(learning_rate)
    engine.model.update_statistics(norm_GK1[:, :-1])
    return Outcome(loss, False, agreed_signal)


def _judge(
    head: PartialFC, emb_GLD: torch.Tensor, label_G: torch.Tensor, shares: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of all L embeddings of each image, divided by `shares`, and its gradient [G, L * D]."""
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
