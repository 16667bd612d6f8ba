"""The training loop of a run, on all ranks together.

    step        next micro-batches -> train_step -> run log; at intervals evaluate and save
    signal      save and leave
    divergence  a step is skipped if its loss or gradient is not finite; after too many in a row, return to
                the newest checkpoint or end the run

Steps count from 0. A record or checkpoint "at step n" holds the state after n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from data_pipeline.batch import Batch, RankSlice
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import GatherLabels
from data_pipeline.streaming.loader import RemoteLoader
from trainer.config import Schedule
from trainer.divergence import Divergence
from trainer.evaluation.during_training import Evaluation
from trainer.inference.embedder import Embedder, Interrupted
from trainer.run_log import RunLog
from trainer.runtime.ranks import Ranks, from_first
from trainer.runtime.signals import EXIT_CODE, StopRequest, name_of
from trainer.step import Outcome, seed_dropout, train_step
from trainer.train_state import Checkpoints, TrainState

# first step, cursor of a stream, function that gathers the labels of all ranks -> batches from that step on
MakeLoader = Callable[[int, list[list[int]] | None, GatherLabels], Loader | RemoteLoader]


@dataclass
class Training:
    """A run that starts from the present values of `state`; `execute` runs its steps.

    cursor: for a stream, at the checkpoint from which the run resumes, for each rank the position of the
    shard that it is reading and the number of finished samples of that shard.
    """

    ranks: Ranks
    stop: StopRequest
    rank_slice: RankSlice
    schedule: Schedule
    state: TrainState
    make_loader: MakeLoader
    evaluation: Evaluation
    checkpoints: Checkpoints
    divergence: Divergence
    log: RunLog
    cursor: list[list[int]] | None

    def execute(self, first_step: int) -> int:
        """Run all steps from `first_step` on; evaluate before the first and after the last.

        Return 0, or the number of the signal after which the run was saved and ended.
        """
        done, stopped_by = first_step, 0
        if first_step in (0, self.schedule.steps) or self._lacks_evaluation(first_step):
            stopped_by = self._evaluate(first_step)
            if stopped_by:
                self._say_leaving(stopped_by, f"nothing has changed since step {first_step}")
        if not stopped_by:
            self.checkpoints.prepare()
        while done < self.schedule.steps and not stopped_by:
            done, stopped_by = self._steps_from(done)
        self.checkpoints.close()
        return stopped_by

    def give_up_saving(self, reason: str) -> None:
        """Remove the incomplete checkpoint when the save after a signal fails or exceeds its deadline."""
        self.checkpoints.clean()
        self._say_leaving(self.stop.signal, f"nothing more is saved: {reason}")

    def _steps_from(self, first_step: int) -> tuple[int, int]:
        """Run steps until the last one, a signal, or a divergence, which returns the run to a checkpoint.

        Return the step from which to continue and the number of the signal, 0 if there was none.
        """
        schedule = self.schedule
        self.loader = self.make_loader(first_step, self.cursor, self._gathered)
        self.log.start_timing()
        for step in range(first_step, schedule.steps):
            outcome = self._step(step, self.loader, is_slow=step == first_step)
            done = step + 1
            has_diverged = self.divergence.has_diverged
            is_save_due = schedule.is_due(done, schedule.save_every)
            # A checkpoint must not contain steps that are missing in metrics.jsonl.
            if is_save_due or outcome.signal or has_diverged or schedule.is_due(done, schedule.log_every):
                self.log.flush()
                is_save_due |= self.checkpoints.must_retry_save()
            if outcome.signal:
                self._save_and_leave(done, outcome.signal)
                return done, outcome.signal
            if has_diverged:
                return self._roll_back(done, float(outcome.loss)), 0
            # A bad state may be the cause of skipped steps: nothing is saved until a step succeeds.
            if is_save_due and self.divergence.skips_in_a_row == 0:
                self._save(done)
            if schedule.is_due(done, schedule.evaluate_every):
                signal = self._evaluate(done)
                if signal:
                    self._save_and_leave(done, signal)
                    return done, signal
            self.log.exclude_time_since_step()
        return schedule.steps, 0

    def _step(self, step: int, loader: Loader | RemoteLoader, *, is_slow: bool) -> Outcome:
        rate = self.schedule.learning_rate(step)
        seed_dropout(self.schedule.seed, step, self.ranks.rank)
        batches = self.log.timing(islice(loader, self.rank_slice.accumulation))
        outcome = train_step(
            self.state.engine,
            self.state.head,
            self._noted(step, batches, is_slow),
            step=step,
            label_N=loader.labels_of_step(step) if self.state.head.is_sampled else None,
            accumulation=self.rank_slice.accumulation,
            learning_rate=rate,
            signal=self.stop.signal,
            group=self.ranks.group,
        )
        self.log.step_done(step + 1, outcome.loss, rate, is_skipped=outcome.is_skipped)
        self.divergence.count(is_skipped=outcome.is_skipped)
        return outcome

    def _noted(self, step: int, batches: Iterable[Batch], is_slow: bool) -> Iterator[Batch]:
        """Yield the batches, and report to the watchdog whether the run waits for one or computes.

        is_slow: the watchdog allows three times its timeout, as for the first step.
        """
        iterator, pulse = iter(batches), self.ranks.pulse
        while True:
            pulse.note(step, "waiting for images", is_slow=is_slow)
            batch = next(iterator, None)
            pulse.note(step, "computing", is_slow=is_slow)
            if batch is None:
                return
            yield batch

    def _gathered(self, number_N: torch.Tensor) -> torch.Tensor:
        """Return the numbers of all ranks, rank 0's first; all ranks must pass equally many."""
        number_N = number_N.to(self.ranks.device)
        of_all = [torch.empty_like(number_N) for _ in range(self.ranks.world_size)]
        dist.all_gather(of_all, number_N, group=self.ranks.group)
        return torch.cat(of_all)

    def _save(self, step: int, *, is_last: bool = False) -> None:
        self.ranks.pulse.note(step, "saving", is_slow=True)
        self.checkpoints.save(step, self._cursor(), is_last=is_last or step == self.schedule.steps)

    def _cursor(self) -> list[list[int]] | None:
        """Return the cursor of a stream; None with a catalog, where the step determines the samples."""
        if not isinstance(self.loader, RemoteLoader):
            return None
        return self._gathered(torch.tensor(self.loader.cursor)).reshape(-1, 2).tolist()

    def _save_and_leave(self, step: int, signal: int) -> None:
        """Save because of a signal; if that fails or exceeds the deadline, exit at once with EXIT_CODE."""
        self.stop.start_clock()
        if self.divergence.skips_in_a_row > 0:
            self._say_leaving(
                signal,
                f"step {step} is not saved: the last {self.divergence.skips_in_a_row} steps were skipped",
            )
            return
        try:
            if not self.checkpoints.has_saved(step):
                self._save(step, is_last=True)
        except Exception as error:
            self.stop.give_up(str(error))
        self._say_leaving(signal, f"saved at step {step}")

    def _say_leaving(self, signal: int, what: str) -> None:
        who = name_of(signal) if signal else "another rank was told to stop"
        self.log.say(f"{who}: {what}; leaving with exit code {EXIT_CODE}, to be started again")

    def _roll_back(self, failed_step: int, loss: float) -> int:
        """Return to the newest checkpoint and return its step.

        Raises ValueError, on all ranks, if no rollback is left or there is no checkpoint.
        """
        self.ranks.pulse.note(failed_step, "returning to a checkpoint", is_slow=True)
        # A running save is completed before the rollback or the end: it may be the last good one.
        self.checkpoints.wait()
        restored = self.checkpoints.restore() if self.divergence.may_roll_back(failed_step) else None
        if restored is None:
            rate = self.schedule.learning_rate(failed_step - 1)
            raise ValueError(self.divergence.diagnosis(failed_step, loss, rate))
        path, header = restored
        message = f"{self.divergence.skips_in_a_row} steps in a row were skipped: back to {path}"
        self.divergence.rolled_back(failed_step)
        self.cursor = header.cursor
        self.log.rolled_back(header.step, failed_step, message)
        return header.step

    def _lacks_evaluation(self, step: int) -> bool:
        """Return True if an earlier process ended between the checkpoint of a step and its evaluation."""
        if step % self.schedule.evaluate_every or not self.evaluation.names:
            return False
        return not from_first(self.log.has_evaluation(step), self.ranks.group)

    def _evaluate(self, step: int) -> int:
        """Evaluate and record the figures. Return 0, or the number of the signal that interrupted it."""
        if not self.evaluation.names:
            return 0
        self.state.engine.synchronize_statistics()
        embedder = Embedder(
            lambda images_BCHW: self._embed(step, images_BCHW),
            self.evaluation.image_size,
            self.evaluation.batch_size,
            self.ranks,
            signal=lambda: self.stop.signal,
        )
        try:
            self.evaluation.run(embedder)
        except Interrupted as interrupted:
            return interrupted.number
        for name, tasks in self.evaluation.results.items():
            for task, scores in tasks.items():
                self.log.evaluated(step, name, task, scores.figures)
        return 0

    def _embed(self, step: int, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.ranks.pulse.note(step, "evaluating", is_slow=True)
        return self.state.engine.embed(images_BCHW)
