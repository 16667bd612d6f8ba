"""Entry points of a process of a job, however launched: join the other ranks, then train or evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from data_pipeline.batch import RankSlice
from data_pipeline.common.progress_bar import progress_bar
from data_pipeline.indexed.loader import Loader
from data_pipeline.quarantine import Quarantine
from data_pipeline.source import LoaderContext, open_source
from data_pipeline.streaming.loader import RemoteLoader
from trainer.checkpoint import sharded as checkpoint
from trainer.config import RunConfig, load, micro_batch
from trainer.divergence import Divergence, Suspects
from trainer.engine import uses_bf16
from trainer.evaluation.during_training import Evaluation
from trainer.evaluation.protocol import Results
from trainer.evaluation.suite import Suite, SuiteConfig
from trainer.inference import network as extraction
from trainer.inference.embedder import Embedder, Network
from trainer.loop import GatherLabels, Training
from trainer.report import evaluation as files
from trainer.report.summary import conclude, device_name
from trainer.run_log import QUARANTINE_FILE, RunLog
from trainer.runtime.ranks import Ranks, join
from trainer.runtime.signals import Stopped, StopRequest
from trainer.train_state import Checkpoints, build_or_resume


def train(config: Path, overrides: Sequence[str], stop: StopRequest) -> None:
    """Train as the configuration file says, changed by `key=value` overrides.

    `stop` is made, and entered, by whoever starts the process, before this module is imported: that takes
    seconds, in which a signal would end the process instead of stopping the run.

    A failure is printed by the first rank that has one and ends the process with exit code 1. Raises Stopped
    on all ranks if a signal asked any of them to stop.
    """
    with join() as ranks:
        stopped_by = run(load(config, overrides), ranks, stop)
    if stopped_by:
        raise Stopped(stopped_by, is_first=ranks.is_first)


def run(config: RunConfig, ranks: Ranks, stop: StopRequest) -> int:
    """Train from where the run directory stands to the last step, on all ranks together.

    Return 0, or the number of the signal that ended the run earlier.

    Raises ValueError for what the user can correct: configuration, dataset, checkpoint, divergence.
    """
    ranks.pulse.limit(config.watchdog.timeout_s)
    micro = micro_batch(config, ranks.world_size)
    rank_slice = RankSlice(ranks.rank, ranks.world_size, config.global_batch, micro)
    source = open_source(config.data)
    evaluation = Evaluation(
        config.verification_files(),
        config.evaluation.suite,
        config.data.image_size,
        config.evaluation.batch_size,
    )
    if ranks.is_first:
        _make_run_dir(config.run_dir)
    state, saved = build_or_resume(config, source, ranks, micro)
    first_step, cursor = (saved.step, saved.cursor) if saved else (0, None)
    schedule = config.schedule(source.images)
    quarantine = Quarantine(config.run_dir / QUARANTINE_FILE, config.data.max_bad_share)

    def make_loader(
        step: int, cursor: list[list[int]] | None, gather_labels: GatherLabels
    ) -> Loader | RemoteLoader:
        local = ranks.placement.local_world_size
        context = LoaderContext(rank_slice, config.seed, step, cursor, local, ranks.device_id)
        return source.loader(context, quarantine, gather_labels)

    with RunLog(
        config.run_dir,
        steps=schedule.steps,
        first_step=first_step,
        global_batch=config.global_batch,
        quarantine=quarantine,
        is_first=ranks.is_first,
    ) as log:
        if ranks.is_first_on_node:
            log.serve(config.metrics)
        log.say(
            f"{source.images or 'streamed'} images of {source.num_classes} identities; "
            f"{ranks.world_size} ranks on {ranks.device.type}, "
            f"{rank_slice.accumulation} x {micro} images each; steps {first_step} to {schedule.steps}"
        )
        suspects = Suspects(config.data.path or config.data.shards, config.head.scale)
        training = Training(
            ranks,
            stop,
            rank_slice,
            schedule,
            state,
            make_loader,
            evaluation,
            Checkpoints(config, source, state, ranks, log),
            Divergence(config.skip_limit, config.rollback_limit, suspects),
            log,
            cursor,
        )
        stop.keep_deadline(
            config.checkpoint.deadline_s, is_first=ranks.is_first, tidy=training.give_up_saving
        )
        stopped_by = training.execute(first_step)
    if not stopped_by and ranks.is_first:
        ranks.pulse.note(schedule.steps, "writing the report", is_slow=True)
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


def evaluate(
    path: Path, config: SuiteConfig, *, name: str, batch_size: int, out: Path | None
) -> Results | None:
    """Results of a network on a suite called `name`, also written to the folder `out`; None but on rank 0.

    `path` is a checkpoint, a run (its newest), or a network's file (.pt, .safetensors).
    """
    with join() as ranks, _progress(ranks) as progress:
        if ranks.is_first and out is not None:
            out.mkdir(parents=True, exist_ok=True)  # not to find out after hours that it cannot be made
        suite = Suite(config)
        found = extraction.network_of(path, ranks)
        network = _with_autocast(found, ranks)
        results = suite.evaluate(Embedder(network, found.image_size, batch_size, ranks, progress=progress))
        if ranks.is_first and out is not None:
            about = {
                "suite": name,
                "checkpoint": str(path),
                "step": found.step,
                "world_size": ranks.world_size,
                "device": device_name(ranks.device),
                "versions": checkpoint.versions(),
            }
            files.write(out, results, about)
    return results if ranks.is_first else None


def _progress(ranks: Ranks) -> AbstractContextManager[Callable[[int, int], None]]:
    return progress_bar("embedding") if ranks.is_first else nullcontext(lambda done, total: None)


def _with_autocast(found: extraction.Network, ranks: Ranks) -> Network:
    is_bf16 = uses_bf16(found.engine, ranks.device)

    @torch.inference_mode()
    def network(images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=is_bf16):
            return found.model(images_BCHW).emb_BD.float()

    return network
