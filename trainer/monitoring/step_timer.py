"""Where the time of the steps goes, and the losses that are still on the device.

A loss is a tensor until somebody looks: fetching it at every step would make the host wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from data_pipeline.batch import Batch


class Span(NamedTuple):
    """The steps between two looks: (step, loss, learning rate) of each; mean times of a step, seconds."""

    steps: list[tuple[int, float, float]]
    step_s: float
    data_wait_s: float


class Pace:
    """Measures steps; what happens between them, such as saving, is left out."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._steps: list[tuple[int, float]] = []
        self._span_s = self._wait_s = 0.0
        self._mark = time.perf_counter()

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on, measuring how long each takes to come."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def step_done(self, step: int, loss: torch.Tensor, learning_rate: float) -> float:
        """Note that `step` is done; returns the seconds that it took on the host."""
        self._losses.append(loss)
        self._steps.append((step, learning_rate))
        return self._count()

    def take(self) -> Span:
        """The span since the last look. Waits for the device, which counts as time of the steps."""
        losses = torch.stack(self._losses).tolist()
        self._count()
        count = len(losses)
        steps = [(step, loss, rate) for (step, rate), loss in zip(self._steps, losses, strict=True)]
        span = Span(steps, self._span_s / count, self._wait_s / count)
        self._losses, self._steps, self._span_s, self._wait_s = [], [], 0.0, 0.0
        return span

    def leave_out_since_step(self) -> None:
        """Count the time from now on; what has passed since the last note is nobody's step."""
        self._mark = time.perf_counter()

    def _count(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._span_s += passed
        return passed
