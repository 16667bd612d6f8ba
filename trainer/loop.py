"""A run from its configuration to its report: what is made once, what happens at each step, what is left.

    open      catalog, verification sets, network, head; the newest checkpoint of the run directory, if any
    step      next micro-batches -> train_step -> records, metrics, display; now and then evaluate and save
    close     last evaluation and checkpoint, result.json, report.html

Step t counts from 0; what is recorded or saved "at step n" is the state after n steps.
"""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError

from data_pipeline.catalog import Catalog, open_catalog
from data_pipeline.loader import Loader, Share
from partial_fc.head import PartialFC
from trainer import backbones, checkpoint, checkpoint_files
from trainer.config import RunConfig, differences, micro_batch
from trainer.distributed import Ranks
from trainer.engine import Engine
from trainer.evaluation.pair_protocol import VerificationResult
from trainer.evaluation.verification import PairSets
from trainer.metrics import Metrics, serve
from trainer.pace import Pace
from trainer.progress import Display, Reading
from trainer.records import Records
from trainer.results import conclude
from trainer.saver import Saver
from trainer.schedule import learning_rate
from trainer.step import Outcome, seed_dropout, train_step


def run(config: RunConfig, ranks: Ranks) -> None:
    """Train from where the run directory stands to the last step, on all ranks together.

    Raises ValueError for what the user can put right: configuration, dataset, checkpoint, divergence.
    """
    micro = micro_batch(config, ranks.world_size)
    share = Share(ranks.rank, ranks.world_size, config.global_batch, micro)
    catalog = open_catalog(config.data.path, config.data.num_classes)
    pairs = PairSets(
        config.verification_files(),
        image_size=config.data.image_size,
        batch_size=config.evaluation.batch_size,
        ranks=ranks,
    )
    if ranks.is_first:
        _make_run_dir(config.run_dir)
    first_step, engine, head = _open_model(config, catalog, ranks, micro)
    records = Records(config.run_dir, first_step) if ranks.is_first else None
    steps = config.total_steps(len(catalog))
    with Display(steps, first_step, enabled=ranks.is_first) as display:
        training = _Training(config, ranks, share, catalog, pairs, engine, head, records, display, steps)
        training.execute(first_step)
    if ranks.is_first:
        conclude(config, catalog, pairs.sets, training.results, ranks)


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        raise ValueError(
            f"run_dir {run_dir}: expected a folder that can be written, found: {error.strerror}; set another"
        ) from error


def _open_model(
    config: RunConfig, catalog: Catalog, ranks: Ranks, micro: int
) -> tuple[int, Engine, PartialFC]:
    """Network and head as they were when the run was last saved, or new; and the steps done by then."""
    torch.manual_seed(config.seed)
    model = backbones.build(config.backbone, config.data.image_size).to(ranks.device)
    head = PartialFC(
        config.head,
        num_classes=catalog.num_classes,
        embedding_size=model.embedding_size,
        seed=config.seed,
        group=ranks.group,
        device=ranks.device,
    )
    network = checkpoint.backbone_state(model)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in network["backbone_weight"].items()}
    first_step = 0
    latest = _agreed_checkpoint(config, ranks)
    if latest is not None:
        header = checkpoint_files.read_manifest(latest).header
        _refuse_changes(config, catalog, header)
        state = {**network, "backbone_momentum": momentum, "head": head.logical_state()}
        checkpoint.load(latest, state, group=ranks.group)
        first_step = header.step
    engine = Engine(
        model,
        config.engine,
        config.optimizer,
        micro_batch=micro,
        group=ranks.group,
        device=ranks.device,
        momentum=momentum,
    )
    return first_step, engine, head


def _agreed_checkpoint(config: RunConfig, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint, None if there is none; what killed saves have left goes."""
    if ranks.is_first:
        checkpoint_files.clean(config.run_dir)
    return checkpoint.newest(config.run_dir, group=ranks.group)


def _refuse_changes(config: RunConfig, catalog: Catalog, header: checkpoint_files.Header) -> None:
    try:
        # Keys that are newer than the checkpoint had their defaults then.
        before = RunConfig.model_validate(header.config).model_dump(mode="json")
    except ValidationError:
        before = header.config
    changed = differences(
        {**before, "dataset": header.dataset},
        {**config.model_dump(mode="json"), "dataset": catalog.identity},
    )
    if changed:
        raise ValueError(
            f"{config.run_dir} holds a run of another configuration, at step {header.step}; "
            f"changed keys: {'; '.join(changed)}; change them back, or set another run_dir"
        )


class _Training:
    """The steps of a run on one rank, and what accompanies them."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        share: Share,
        catalog: Catalog,
        pairs: PairSets,
        engine: Engine,
        head: PartialFC,
        records: Records | None,
        display: Display,
        steps: int,
    ) -> None:
        self.config, self.ranks, self.share, self.catalog, self.pairs = config, ranks, share, catalog, pairs
        self.engine, self.head, self.records, self.display, self.steps = engine, head, records, display, steps
        self.metrics = Metrics()
        self.saver = Saver(
            config.run_dir, config.checkpoint, group=ranks.group, metrics=self.metrics, say=display.say
        )
        self.skips_in_a_row = 0
        self.skipped: set[int] = set()  # since the last look
        self.results: dict[str, VerificationResult] = {}

    def execute(self, first_step: int) -> None:
        """All steps from `first_step` on; evaluates before the first and after the last."""
        if self.ranks.is_first_on_node:
            serve(self.metrics, self.config.metrics)
        self.display.say(
            f"{len(self.catalog)} images of {self.catalog.num_classes} identities; "
            f"{self.ranks.world_size} ranks on {self.ranks.device.type}, "
            f"{self.share.accumulation} x {self.share.micro_batch} images each; "
            f"steps {first_step} to {self.steps}"
        )
        if first_step in (0, self.steps):
            self._evaluate(first_step)
        loader = self._loader(first_step)
        self.saver.prepare(self._state())
        pace = Pace()
        for step in range(first_step, self.steps):
            self._step(step, loader, pace)
            done = step + 1
            is_save_due = self._is_due(done, self.config.checkpoint.every_steps)
            # A checkpoint never knows of steps that the records do not.
            if is_save_due or self._is_due(done, self.config.log_every_steps):
                self._look(pace)
                is_save_due |= self.saver.look()
            # While steps are skipped the state may be what makes them fail: the one before is kept instead.
            if is_save_due and self.skips_in_a_row == 0:
                self._save(done)
            if self._is_due(done, self.config.evaluation.every_steps):
                self._evaluate(done)
            pace.leave_out_since_step()
        self.saver.close()

    def _is_due(self, done: int, every_steps: int) -> bool:
        return done == self.steps or done % every_steps == 0

    def _step(self, step: int, loader: Loader, pace: Pace) -> None:
        optimizer = self.config.optimizer
        rate = learning_rate(
            step,
            peak=optimizer.learning_rate,
            warmup_steps=optimizer.warmup_steps,
            steps=self.steps,
            power=optimizer.power,
        )
        seed_dropout(self.config.seed, step, self.ranks.rank)
        outcome = train_step(
            self.engine,
            self.head,
            pace.waiting_for(islice(loader, self.share.accumulation)),
            step=step,
            label_N=loader.labels_of_step(step) if self.config.head.sample_rate < 1 else None,
            accumulation=self.share.accumulation,
            learning_rate=rate,
            group=self.ranks.group,
        )
        step_s = pace.step_done(step + 1, outcome.loss, rate)
        self.metrics.step_done(step + 1, self.share.global_batch, rate, step_s)
        self.display.advance(step + 1)
        self._count_skips(step + 1, outcome, rate, pace)

    def _count_skips(self, step: int, outcome: Outcome, rate: float, pace: Pace) -> None:
        """Raise ValueError, on all ranks alike, if too many steps in a row could not be taken."""
        if not outcome.is_skipped:
            self.skips_in_a_row = 0
            return
        self.skips_in_a_row += 1
        self.skipped.add(step)
        self.metrics.step_skipped()
        if self.skips_in_a_row == self.config.skip_limit:
            self._look(pace)
            raise ValueError(_diagnosis(step, self.skips_in_a_row, float(outcome.loss), rate, self.config))

    def _loader(self, first_step: int) -> Loader:
        return Loader(
            self.config.data,
            self.catalog,
            self.share,
            seed=self.config.seed,
            first_step=first_step,
            ranks_on_node=self.ranks.placement.local_world_size,
            device_id=self.ranks.device_id,
        )

    def _look(self, pace: Pace) -> None:
        """Fetch the losses since the last look, which waits for the device, and tell everybody."""
        span = pace.take()
        samples_per_s = self.share.global_batch / span.step_s
        for step, loss, rate in span.steps:
            if self.records is not None:
                self.records.write(
                    "skipped" if step in self.skipped else "train",
                    step,
                    samples=step * self.share.global_batch,
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
        self.metrics.looked(loss, samples_per_s, span.data_wait_s * len(span.steps))
        self.display.show(Reading(step, loss, rate, samples_per_s, span.data_wait_s / span.step_s))

    def _save(self, step: int) -> None:
        self.engine.synchronize_statistics()
        header = checkpoint_files.Header(
            step, self.config.model_dump(mode="json"), self.catalog.identity, checkpoint.versions()
        )
        self.saver.save(self._state, header, is_last=step == self.steps)

    def _state(self) -> checkpoint.State:
        """All that is to be saved; all ranks call it together."""
        return {**self.engine.state(), "head": self.head.logical_state()}

    def _evaluate(self, step: int) -> None:
        self.engine.synchronize_statistics()
        self.results = self.pairs.evaluate(self.engine.embed)
        for name, result in self.results.items():
            if self.records is not None:
                self.records.write("evaluation", step, set=name, time_s=time.time(), **result.summary())
            self.display.say(
                f"step {step}: {name} accuracy {result.accuracy:.2%} +- {result.accuracy_std:.2%}"
            )


def _diagnosis(step: int, skips: int, loss: float, rate: float, config: RunConfig) -> str:
    """What to look at when nothing but skipped steps comes."""
    where = "a gradient" if math.isfinite(loss) else "the loss"
    return (
        f"steps {step - skips + 1} to {step}: {where} was not finite in any of these {skips} (skip_limit), "
        "so none was taken: training has diverged. Look at, in this order: the learning rate, "
        f"{rate:.3g} now: lower optimizer.learning_rate or lengthen optimizer.warmup_steps; the labels: "
        f"identities mixed up in {config.data.path} let the loss rise until it breaks; head.scale, "
        f"{config.head.scale:g} now, and the size of head.margin: lower them. Then train anew in another "
        "run_dir"
    )
