"""Reaction to steps skipped in a row: a rollback to a checkpoint, or the end of the run with a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Suspects(NamedTuple):
    """Settings that a diagnosis names: the sources of the images, and the scale of the logits."""

    sources: Sequence[object]
    scale: float


class Divergence:
    """Counter of the skipped steps and rollbacks of a run, the same on all ranks.

    A run diverges when `skip_limit` steps in a row are skipped. It may roll back `rollback_limit` times, and
    only if it fails at a later step than the last time.
    """

    def __init__(self, skip_limit: int, rollback_limit: int, suspects: Suspects) -> None:
        self._skip_limit, self._rollback_limit, self._suspects = skip_limit, rollback_limit, suspects
        self.skips_in_a_row = 0
        self._rollbacks, self._failed_at = 0, 0

    def count(self, *, is_skipped: bool) -> None:
        """Count a step."""
        self.skips_in_a_row = self.skips_in_a_row + 1 if is_skipped else 0

    @property
    def has_diverged(self) -> bool:
        """True if the limit of skipped steps in a row is reached."""
        return self.skips_in_a_row == self._skip_limit

    def may_roll_back(self, failed_step: int) -> bool:
        """Return True if a rollback is left and the run has got further than at the last failure."""
        return self._rollbacks < self._rollback_limit and failed_step > self._failed_at

    def rolled_back(self, failed_step: int) -> None:
        """Count a rollback from `failed_step`."""
        self._failed_at = failed_step
        self._rollbacks += 1
        self.skips_in_a_row = 0

    def diagnosis(self, step: int, loss: float, learning_rate: float) -> str:
        """Return an error message with the likely causes; `loss` is that of the last skipped step."""
        again = f", after {self._rollbacks} rollback(s) to a checkpoint" if self._rollbacks else ""
        where = "loss" if not math.isfinite(loss) else "gradient"
        return (
            f"steps {step - self.skips_in_a_row + 1} to {step}: expected finite values, found a non-finite "
            f"{where} in each of these {self.skips_in_a_row} steps (skip_limit){again}: training has "
            f"diverged. Check, in this order: the learning rate, now {learning_rate:.3g}: lower "
            "optimizer.learning_rate or raise optimizer.warmup_steps; the labels: mixed-up identities in "
            f"{', '.join(map(str, self._suspects.sources))} raise the loss; head.scale, now "
            f"{self._suspects.scale:g}, and the margin of head.margin: lower them. Then start again with "
            "another run_dir"
        )
