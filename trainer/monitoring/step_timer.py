"""Timing of the steps, and their losses, which stay on the device until `take` fetches them.

Fetching each loss at once would make the host wait for the device at every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from data_pipeline.batch import Batch


class Span(NamedTuple):
    """The steps since the previous `take`: (step, loss, learning rate) of each; mean times of a step, s."""

    steps: list[tuple[int, float, float]]
    step_s: float
    data_wait_s: float


class StepTimer:
    """Timer of steps; time between steps, such as that of saving, can be excluded."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._steps: list[tuple[int, float]] = []
        self._span_s = self._wait_s = 0.0
        self._mark = time.perf_counter()

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time of waiting for each."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def step_done(self, step: int, loss: torch.Tensor, learning_rate: float) -> float:
        """Record that `step` is done; return the seconds that it took on the host."""
        self._losses.append(loss)
        self._steps.append((step, learning_rate))
        return self._count()

    def take(self) -> Span:
        """Return the steps since the previous call. Waiting for the device counts as time of the steps."""
        losses = torch.stack(self._losses).tolist()
        self._count()
        count = len(losses)
        steps = [(step, loss, rate) for (step, rate), loss in zip(self._steps, losses, strict=True)]
        span = Span(steps, self._span_s / count, self._wait_s / count)
        self._losses, self._steps, self._span_s, self._wait_s = [], [], 0.0, 0.0
        return span

    def exclude_since_step(self) -> None:
        """Exclude the time since the last step from the next one."""
        self._mark = time.perf_counter()

    def _count(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._span_s += passed
        return passed
