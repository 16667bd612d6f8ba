"""Records and display of a training run: one call per event, made on every rank.

    step_done     a step is over; its loss stays on the device
    flush         fetch the losses since the last flush, and write, count and show them
    evaluated, rolled_back, say

The calls write `metrics.jsonl` and the terminal (rank 0) and update the Prometheus metrics (every rank).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch

from data_pipeline.batch import Batch
from data_pipeline.quarantine import Quarantine
from trainer.config import MetricsConfig
from trainer.monitoring.console import Display, Reading
from trainer.monitoring.metrics_log import MetricsLog, read
from trainer.monitoring.prometheus import Metrics, serve
from trainer.monitoring.step_timer import StepTimer
from trainer.report.tables import shown, title

QUARANTINE_FILE = "quarantine.jsonl"
_FIGURES_SHOWN = 3


class RunLog:
    """The log of one rank; a context manager that shows a progress bar inside its block.

    metrics: those of this process, for modules that update their own. first_step: the step from which the run
    starts or resumes; records of later steps are removed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        steps: int,
        first_step: int,
        global_batch: int,
        quarantine: Quarantine,
        is_first: bool,
    ) -> None:
        self._run_dir, self._global_batch, self._quarantine = run_dir, global_batch, quarantine
        self._records = MetricsLog(run_dir, first_step) if is_first else None
        self._display = Display(steps, first_step, enabled=is_first)
        self.metrics, self._timer = Metrics(), StepTimer()
        self._bad_records = quarantine.listed()
        self._skipped: set[int] = set()  # since the last flush
        if self._records is not None and self._records.unreadable:
            self.say(
                f"{run_dir / 'metrics.jsonl'}: {self._records.unreadable} lines were no records and are "
                "removed"
            )

    def __enter__(self) -> RunLog:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def serve(self, config: MetricsConfig) -> None:
        """Serve the metrics of this process over HTTP."""
        serve(self.metrics, config)

    def say(self, message: str) -> None:
        """Show a line to the user."""
        self._display.say(message)

    def start_timing(self) -> None:
        """Start timing; steps that were timed and not flushed are dropped."""
        self._timer = StepTimer()

    def exclude_time_since_step(self) -> None:
        """Exclude the time since the last step, such as that of saving, from the next one."""
        self._timer.exclude_since_step()

    def timing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time of waiting for each."""
        return self._timer.waiting_for(batches)

    def step_done(self, step: int, loss: torch.Tensor, learning_rate: float, *, is_skipped: bool) -> None:
        """Count a step after which the run has done `step`; does not wait for the device."""
        step_s = self._timer.step_done(step, loss, learning_rate)
        self.metrics.step_done(step, self._global_batch, learning_rate, step_s)
        self._display.advance(step)
        if is_skipped:
            self._skipped.add(step)
            self.metrics.step_skipped()

    def flush(self) -> None:
        """Fetch the losses since the last flush, which waits for the device; record and show them."""
        span = self._timer.take()
        samples_per_s = self._global_batch / span.step_s
        for step, loss, rate in span.steps:
            if self._records is not None:
                self._records.write(
                    "skipped" if step in self._skipped else "train",
                    step,
                    samples=step * self._global_batch,
                    # JSON has no non-finite numbers.
                    loss=loss if math.isfinite(loss) else None,
                    learning_rate=rate,
                    samples_per_s=samples_per_s,
                    data_wait_s=span.data_wait_s,
                    step_s=span.step_s,
                    time_s=time.time(),
                )
        self._skipped.clear()
        step, loss, rate = span.steps[-1]
        bad_records = self._quarantine.listed()
        if bad_records > self._bad_records:
            self._bad_records = bad_records
            self.say(f"{bad_records} bad records so far: {self._run_dir / QUARANTINE_FILE}")
        self.metrics.logged(loss, samples_per_s, span.data_wait_s * len(span.steps), bad_records)
        self._display.show(Reading(step, loss, rate, samples_per_s, span.data_wait_s / span.step_s))

    def evaluated(self, step: int, name: str, task: str, figures: dict[str, float]) -> None:
        """Record the figures of an evaluation; called only on rank 0, which has them."""
        assert self._records is not None
        self._records.write("evaluation", step, set=name, task=task, time_s=time.time(), **figures)
        self.metrics.evaluated(name, task, figures)
        first = [f"{title(key)} {shown(key, value)}" for key, value in figures.items()][:_FIGURES_SHOWN]
        self.say(f"step {step}: {name}, {task}: {', '.join(first)}")

    def has_evaluation(self, step: int) -> bool:
        """Return whether an evaluation at `step` is recorded; False except on rank 0."""
        if self._records is None:
            return False
        return any((r["kind"], r["step"]) == ("evaluation", step) for r in read(self._run_dir))

    def rolled_back(self, step: int, failed_step: int, message: str) -> None:
        """Record that the run returns to the checkpoint at `step`; remove the records of later steps."""
        self.metrics.rollbacks.inc()
        if self._records is not None:
            self._records = MetricsLog(self._run_dir, step)
            self._records.write("rollback", step, failed_step=failed_step, time_s=time.time())
        self.say(message)
