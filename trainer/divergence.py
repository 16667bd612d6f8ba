"""Reaction to steps that are skipped in a row: a rollback to a checkpoint, or an end with a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Suspects(NamedTuple):
    """Settings that a diagnosis names: where the images come from, and the scale of the logits."""

    sources: Sequence[object]
    scale: float


class Divergence:
    """Counts skipped steps and rollbacks of a run; alike on all ranks.

    A run diverges when `skip_limit` steps in a row are skipped. It may go back `rollback_limit` times, and
    only while each rollback leads further than the one before.
    """

    def __init__(self, skip_limit: int, rollback_limit: int, suspects: Suspects) -> None:
        self._skip_limit, self._rollback_limit, self._suspects = skip_limit, rollback_limit, suspects
        self.skips_in_a_row = 0
        self._rollbacks, self._failed_at = 0, 0

    def count(self, *, is_skipped: bool) -> None:
        """Take note of a step."""
        self.skips_in_a_row = self.skips_in_a_row + 1 if is_skipped else 0

    @property
    def has_diverged(self) -> bool:
        """True if the limit of skipped steps in a row is reached."""
        return self.skips_in_a_row == self._skip_limit

    def may_roll_back(self, failed_step: int) -> bool:
        """Return whether a rollback from `failed_step` can lead further than those before it."""
        return self._rollbacks < self._rollback_limit and failed_step > self._failed_at

    def rolled_back(self, failed_step: int) -> None:
        """Take note of a rollback from `failed_step`."""
        self._failed_at = failed_step
        self._rollbacks += 1
        self.skips_in_a_row = 0

    def diagnosis(self, step: int, loss: float, learning_rate: float) -> str:
        """Return what to look at when the run can go no further; `loss` is that of the last skipped step."""
        again = f", nor after going back to a checkpoint ({self._rollbacks} times)" if self._rollbacks else ""
        where = "the loss" if not math.isfinite(loss) else "a gradient"
        return (
            f"steps {step - self.skips_in_a_row + 1} to {step}: {where} was not finite in any of these "
            f"{self.skips_in_a_row} (skip_limit), so none was taken{again}: training has diverged. Look at, "
            f"in this order: the learning rate, {learning_rate:.3g} now: lower optimizer.learning_rate or "
            "lengthen optimizer.warmup_steps; the labels: identities mixed up in "
            f"{', '.join(map(str, self._suspects.sources))} let the loss rise until it breaks; head.scale, "
            f"{self._suspects.scale:g} now, and the size of head.margin: lower them. Then train again in "
            "another run_dir"
        )
