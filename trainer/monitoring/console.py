"""Terminal output of a training run: a progress bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.common.terminal import printable

_LOG_EVERY_S = 10.0


class Reading(NamedTuple):
    """Figures after a step: means since the previous reading; the waiting time as a fraction, 0 to 1."""

    step: int
    loss: float
    learning_rate: float
    samples_per_s: float
    data_wait_share: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:7.4f}  lr {self.learning_rate:.2e}  {self.samples_per_s:7.1f} images/s  "
            f"data wait {self.data_wait_share:4.0%}"
        )


class Display:
    """Display of readings and messages on standard error, without any effect unless `enabled` (rank 0)."""

    def __init__(self, steps: int, first_step: int, *, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled, highlight=False)
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=first_step)
        self._steps, self._first_step = steps, first_step
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        self._bar.update(self._task, completed=step)

    def show(self, reading: Reading) -> None:
        """Show a reading; in a log at most one every ten seconds, and always the last."""
        self._bar.update(self._task, description=str(reading))
        now = time.monotonic()
        is_due = now - self._last_line > _LOG_EVERY_S or reading.step == self._steps
        if self._bar.disable and is_due:
            self._last_line = now
            left_s = (now - self._started) / max(1, reading.step - self._first_step)
            left_s *= self._steps - reading.step
            self.say(f"step {reading.step}/{self._steps}  {reading}  {_duration(left_s)} left")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(printable(message), markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
