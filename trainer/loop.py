"""A run from its configuration to its report: what is made once, what happens at each step, what is left.

    open      catalog, verification sets, network, head; the newest checkpoint of the run directory, if any
    step      next micro-batches -> train_step -> records, metrics, display; now and then evaluate and save
    close     last evaluation and checkpoint, result.json, report.html

A step may also end the run early, saved, if a signal asked for it; or, being one of many that could not be
taken, lead back to the newest checkpoint.

Step t counts from 0; what is recorded or saved "at step n" is the state after n steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.batch import Batch, RankSlice
from data_pipeline.indexed.loader import Loader
from data_pipeline.quarantine import Quarantine
from data_pipeline.source import LoaderContext, Source, open_source
from data_pipeline.streaming.loader import RemoteLoader
from trainer.checkpoint import directory as checkpoint_files
from trainer.checkpoint import sharded as checkpoint
from trainer.checkpoint.async_saver import Saver
from trainer.config import RunConfig, learning_rate, micro_batch
from trainer.evaluation.during_training import Evaluation
from trainer.inference.embedder import Embedder, Interrupted
from trainer.monitoring.console import Display, Reading
from trainer.monitoring.metrics_log import Records, read
from trainer.monitoring.prometheus import Metrics, serve
from trainer.monitoring.step_timer import Pace
from trainer.report.summary import conclude
from trainer.report.tables import shown, title
from trainer.runtime.ranks import Ranks
from trainer.runtime.signals import EXIT_CODE, StopRequest, name_of
from trainer.step import Outcome, seed_dropout, train_step
from trainer.train_state import TrainState, agreed_checkpoint, begin

QUARANTINE_FILE = "quarantine.jsonl"
_FIGURES_SHOWN = 3


def run(config: RunConfig, ranks: Ranks, stop: StopRequest) -> int:
    """Train from where the run directory stands to the last step, on all ranks together.

    Returns 0, or the number of the signal that made it end earlier.

    Raises ValueError for what the user can put right: configuration, dataset, checkpoint, divergence.
    """
    ranks.pulse.limit(config.watchdog.timeout_s)
    micro = micro_batch(config, ranks.world_size)
    rank_slice = RankSlice(ranks.rank, ranks.world_size, config.global_batch, micro)
    source = open_source(config.data)
    evaluation = Evaluation(config.verification_files(), config.evaluation.suite)
    if ranks.is_first:
        _make_run_dir(config.run_dir)
    trained, saved = begin(config, source, ranks, micro)
    first_step, cursor = (saved.step, saved.cursor) if saved else (0, None)
    records = Records(config.run_dir, first_step) if ranks.is_first else None
    steps = config.total_steps(source.images)
    with Display(steps, first_step, enabled=ranks.is_first) as display:
        training = _Training(
            config, ranks, stop, rank_slice, source, evaluation, trained, records, display, steps, cursor
        )
        stopped_by = training.execute(first_step)
    if not stopped_by and ranks.is_first:
        ranks.pulse.note(steps, "writing the report", is_slow=True)
        conclude(config, source, evaluation, ranks)
    return stopped_by


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        raise ValueError(
            f"run_dir {run_dir}: expected a folder that can be written, found: {error.strerror}; set another"
        ) from error


class _Training:
    """The steps of a run on one rank, and what accompanies them."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        stop: StopRequest,
        rank_slice: RankSlice,
        source: Source,
        evaluation: Evaluation,
        trained: TrainState,
        records: Records | None,
        display: Display,
        steps: int,
        cursor: list[list[int]] | None,
    ) -> None:
        self.config, self.ranks, self.rank_slice, self.source = config, ranks, rank_slice, source
        self.trained, self.records, self.display, self.steps = trained, records, display, steps
        self.evaluation, self.stop, self.metrics = evaluation, stop, Metrics()
        self.quarantine = Quarantine(config.run_dir / QUARANTINE_FILE, config.data.max_bad_share)
        self.bad_records = self.quarantine.listed()
        self.saver = Saver(
            config.run_dir, config.checkpoint, group=ranks.group, metrics=self.metrics, say=display.say
        )
        self.skips_in_a_row = 0
        self.rollbacks, self.failed_at = 0, 0
        self.skipped: set[int] = set()  # since the last look
        self.cursor = cursor  # where all ranks stood in a stream at the last checkpoint

    def execute(self, first_step: int) -> int:
        """All steps from `first_step` on; evaluates before the first and after the last.

        Returns 0, or the number of the signal after which it saved and went no further.
        """
        if self.ranks.is_first_on_node:
            serve(self.metrics, self.config.metrics)
        self.display.say(
            f"{self.source.images or 'streamed'} images of {self.source.num_classes} identities; "
            f"{self.ranks.world_size} ranks on {self.ranks.device.type}, "
            f"{self.rank_slice.accumulation} x {self.rank_slice.micro_batch} images each; "
            f"steps {first_step} to {self.steps}"
        )
        self.stop.keep_deadline(
            self.config.checkpoint.deadline_s, is_first=self.ranks.is_first, tidy=self._give_up_saving
        )
        done, stopped_by = first_step, 0
        if first_step in (0, self.steps) or self._lacks_evaluation(first_step):
            stopped_by = self._evaluate(first_step)
            if stopped_by:
                self._say_leaving(stopped_by, f"nothing has changed since step {first_step}")
        if not stopped_by:
            self.saver.prepare(self.trained.state())
        while done < self.steps and not stopped_by:
            done, stopped_by = self._steps_from(done)
        self.saver.close()
        return stopped_by

    def _steps_from(self, first_step: int) -> tuple[int, int]:
        """Steps until the last one, a signal, or too many skips in a row, which lead back to a checkpoint.

        Returns the step to go on from and the number of the signal, 0 if there was none.
        """
        self.loader, pace = self._loader(first_step), Pace()
        for step in range(first_step, self.steps):
            outcome = self._step(step, self.loader, pace, is_slow=step == first_step)
            done = step + 1
            is_too_much = self.skips_in_a_row == self.config.skip_limit
            is_save_due = self._is_due(done, self.config.checkpoint.every_steps)
            # A checkpoint never knows of steps that the records do not.
            if (
                is_save_due
                or outcome.signal
                or is_too_much
                or self._is_due(done, self.config.log_every_steps)
            ):
                self._look(pace)
                is_save_due |= self.saver.look()
            if outcome.signal:
                self._save_and_leave(done, outcome.signal)
                return done, outcome.signal
            if is_too_much:
                return self._roll_back(done, float(outcome.loss)), 0
            # While steps are skipped the state may be what makes them fail: the one before is kept instead.
            if is_save_due and self.skips_in_a_row == 0:
                self._save(done)
            if self._is_due(done, self.config.evaluation.every_steps):
                signal = self._evaluate(done)
                if signal:
                    self._save_and_leave(done, signal)
                    return done, signal
            pace.leave_out_since_step()
        return self.steps, 0

    def _lacks_evaluation(self, step: int) -> bool:
        """Whether an earlier life of the run ended between the checkpoint of a step and its evaluation."""
        if step % self.config.evaluation.every_steps or not self.evaluation.names:
            return False
        records = read(self.config.run_dir) if self.ranks.is_first else []
        is_there = [any((r["kind"], r["step"]) == ("evaluation", step) for r in records)]
        dist.broadcast_object_list(is_there, group=self.ranks.group, group_src=0)
        return not is_there[0]

    def _save_and_leave(self, step: int, signal: int) -> None:
        """Save because of a signal; if that fails or takes too long, this does not return."""
        self.stop.start_clock()
        if self.skips_in_a_row > 0:
            self._say_leaving(signal, f"step {step} is not saved, as it was skipped")
            return
        try:
            if not self.saver.has_saved(step):
                self._save(step, and_wait=True)
        except Exception as error:
            self.stop.give_up(str(error))
        self._say_leaving(signal, f"saved at step {step}")

    def _give_up_saving(self, reason: str) -> None:
        checkpoint_files.clean(self.config.run_dir)
        self._say_leaving(self.stop.signal, f"nothing more is saved: {reason}")

    def _say_leaving(self, signal: int, what: str) -> None:
        who = name_of(signal) if signal else "another rank was told to stop"
        self.display.say(f"{who}: {what}; leaving with exit code {EXIT_CODE}, to be started again")

    def _roll_back(self, failed_step: int, loss: float) -> int:
        """Go back to the newest checkpoint; returns its step.

        Raises ValueError, on all ranks alike, if that would only lead here again, or there is none.
        """
        self.ranks.pulse.note(failed_step, "going back to a checkpoint", is_slow=True)
        self.saver.wait()
        is_worse = self.rollbacks == self.config.rollback_limit or failed_step <= self.failed_at
        latest = None if is_worse else agreed_checkpoint(self.config, self.ranks)
        if latest is None:
            rate = self._rate(failed_step - 1)
            raise ValueError(
                _diagnosis(failed_step, self.skips_in_a_row, self.rollbacks, loss, rate, self.config)
            )
        self.failed_at = failed_step
        header = self.trained.restore(latest, self.ranks)
        step, self.cursor = header.step, header.cursor
        self.rollbacks += 1
        self.metrics.rollbacks.inc()
        if self.records is not None:
            self.records = Records(self.config.run_dir, step)
            self.records.write("rollback", step, failed_step=self.failed_at, time_s=time.time())
        self.display.say(f"{self.skips_in_a_row} steps in a row were skipped: back to {latest}")
        self.skips_in_a_row = 0
        return step

    def _is_due(self, done: int, every_steps: int) -> bool:
        return done == self.steps or done % every_steps == 0

    def _step(self, step: int, loader: Loader | RemoteLoader, pace: Pace, *, is_slow: bool) -> Outcome:
        rate = self._rate(step)
        seed_dropout(self.config.seed, step, self.ranks.rank)
        batches = pace.waiting_for(islice(loader, self.rank_slice.accumulation))
        outcome = train_step(
            self.trained.engine,
            self.trained.head,
            self._noted(step, batches, is_slow),
            step=step,
            label_N=loader.labels_of_step(step) if self.config.head.sample_rate < 1 else None,
            accumulation=self.rank_slice.accumulation,
            learning_rate=rate,
            signal=self.stop.signal,
            group=self.ranks.group,
        )
        step_s = pace.step_done(step + 1, outcome.loss, rate)
        self.metrics.step_done(step + 1, self.rank_slice.global_batch, rate, step_s)
        self.display.advance(step + 1)
        if outcome.is_skipped:
            self.skips_in_a_row += 1
            self.skipped.add(step + 1)
            self.metrics.step_skipped()
        else:
            self.skips_in_a_row = 0
        return outcome

    def _rate(self, step: int) -> float:
        optimizer = self.config.optimizer
        return learning_rate(
            step,
            peak=optimizer.learning_rate,
            warmup_steps=optimizer.warmup_steps,
            steps=self.steps,
            power=optimizer.power,
        )

    def _noted(self, step: int, batches: Iterable[Batch], is_slow: bool) -> Iterator[Batch]:
        """Pass the batches on and tell the watchdog whether they are waited for."""
        iterator, pulse = iter(batches), self.ranks.pulse
        while True:
            pulse.note(step, "waiting for images", is_slow=is_slow)
            batch = next(iterator, None)
            pulse.note(step, "computing", is_slow=is_slow)
            if batch is None:
                return
            yield batch

    def _loader(self, first_step: int) -> Loader | RemoteLoader:
        context = LoaderContext(
            self.rank_slice,
            self.config.seed,
            first_step,
            self.cursor,
            self.ranks.placement.local_world_size,
            self.ranks.device_id,
        )
        return self.source.loader(context, self.quarantine, self._gathered)

    def _gathered(self, number_N: torch.Tensor) -> torch.Tensor:
        """The numbers of all ranks, which have equally many each: rank 0's first."""
        number_N = number_N.to(self.ranks.device)
        of_all = [torch.empty_like(number_N) for _ in range(self.ranks.world_size)]
        dist.all_gather(of_all, number_N, group=self.ranks.group)
        return torch.cat(of_all)

    def _look(self, pace: Pace) -> None:
        """Fetch the losses since the last look, which waits for the device, and tell everybody."""
        span = pace.take()
        samples_per_s = self.rank_slice.global_batch / span.step_s
        for step, loss, rate in span.steps:
            if self.records is not None:
                self.records.write(
                    "skipped" if step in self.skipped else "train",
                    step,
                    samples=step * self.rank_slice.global_batch,
                    # JSON has no such numbers.
                    loss=loss if math.isfinite(loss) else None,
                    learning_rate=rate,
                    samples_per_s=samples_per_s,
                    data_wait_s=span.data_wait_s,
                    step_s=span.step_s,
                    time_s=time.time(),
                )
        self.skipped.clear()
        step, loss, rate = span.steps[-1]
        bad_records = self.quarantine.listed()
        if bad_records > self.bad_records:
            self.bad_records = bad_records
            self.display.say(f"{bad_records} bad records so far: {self.config.run_dir / QUARANTINE_FILE}")
        self.metrics.looked(loss, samples_per_s, span.data_wait_s * len(span.steps), bad_records)
        self.display.show(Reading(step, loss, rate, samples_per_s, span.data_wait_s / span.step_s))

    def _save(self, step: int, *, and_wait: bool = False) -> None:
        self.ranks.pulse.note(step, "saving", is_slow=True)
        self.trained.engine.synchronize_statistics()
        header = checkpoint_files.Header(
            step,
            self.config.model_dump(mode="json"),
            self.source.identity,
            checkpoint.versions(),
            self._cursor(),
        )
        self.saver.save(self.trained.state, header, is_last=and_wait or step == self.steps)

    def _cursor(self) -> list[list[int]] | None:
        """Where all ranks stand in a stream; None where the step says it."""
        if not isinstance(self.loader, RemoteLoader):
            return None
        return self._gathered(torch.tensor(self.loader.cursor)).reshape(-1, 2).tolist()

    def _evaluate(self, step: int) -> int:
        """Returns 0, or the number of the signal that cut it short; then nothing is recorded."""
        if not self.evaluation.names:
            return 0
        self.trained.engine.synchronize_statistics()
        embedder = Embedder(
            lambda images_BCHW: self._embed(step, images_BCHW),
            self.config.data.image_size,
            self.config.evaluation.batch_size,
            self.ranks,
            signal=lambda: self.stop.signal,
        )
        try:
            self.evaluation.run(embedder)
        except Interrupted as interrupted:
            return interrupted.number
        for name, tasks in self.evaluation.results.items():
            for task, scores in tasks.items():
                self._show_scores(step, name, task, scores.figures)
        return 0

    def _show_scores(self, step: int, name: str, task: str, figures: dict[str, float]) -> None:
        """On rank 0, which alone has any."""
        assert self.records is not None
        self.records.write("evaluation", step, set=name, task=task, time_s=time.time(), **figures)
        self.metrics.evaluated(name, task, figures)
        first = [f"{title(key)} {shown(key, value)}" for key, value in figures.items()][:_FIGURES_SHOWN]
        self.display.say(f"step {step}: {name}, {task}: {', '.join(first)}")

    def _embed(self, step: int, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.ranks.pulse.note(step, "evaluating", is_slow=True)
        return self.trained.engine.embed(images_BCHW)


def _diagnosis(step: int, skips: int, rollbacks: int, loss: float, rate: float, config: RunConfig) -> str:
    """What to look at when nothing but skipped steps comes."""
    again = f", nor after going back to a checkpoint ({rollbacks} times)" if rollbacks else ""
    where = "a gradient" if math.isfinite(loss) else "the loss"
    return (
        f"steps {step - skips + 1} to {step}: {where} was not finite in any of these {skips} (skip_limit), "
        f"so none was taken{again}: training has diverged. Look at, in this order: the learning rate, "
        f"{rate:.3g} now: lower optimizer.learning_rate or lengthen optimizer.warmup_steps; the labels: "
        f"identities mixed up in {', '.join(map(str, config.data.path or config.data.shards))} "
        "let the loss rise until it breaks; head.scale, "
        f"{config.head.scale:g} now, and the size of head.margin: lower them. Then train anew in another "
        "run_dir"
    )
