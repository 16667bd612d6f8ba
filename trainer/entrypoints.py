"""Entry points of each process of a job, under any launcher: join the other ranks, then train or evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from data_pipeline.batch import RankSlice
from data_pipeline.common.progress_bar import progress_bar
from data_pipeline.common.redaction import redacted
from data_pipeline.indexed.loader import Loader
from data_pipeline.loader import GatherLabels, LoaderContext
from data_pipeline.quarantine import Quarantine
from data_pipeline.source import Source, open_source
from data_pipeline.streaming.loader import RemoteLoader
from trainer.checkpoint.sharded import versions
from trainer.config import RunConfig, Schedule, load, micro_batch
from trainer.divergence import Divergence, Suspects
from trainer.engine import uses_bf16
from trainer.evaluation.during_training import Evaluation
from trainer.evaluation.protocol import Results
from trainer.evaluation.suite import Suite, SuiteConfig
from trainer.inference import network
from trainer.inference.embedder import Embedder, Network
from trainer.loop import MakeLoader, Training
from trainer.report.evaluation import write
from trainer.report.summary import conclude, device_name
from trainer.run_log import QUARANTINE_FILE, RunLog
from trainer.runtime import run_lock
from trainer.runtime.ranks import Ranks, join
from trainer.runtime.signals import Stopped, StopRequest
from trainer.train_state import Checkpoints, build_or_resume


def train(config: Path, overrides: Sequence[str], stop: StopRequest) -> None:
    """Train by the configuration file, changed by `key=value` overrides.

    The caller creates and enters `stop` before it imports this module: the import takes seconds, in which a
    signal would otherwise end the process instead of stopping the run.

    The first rank that fails prints its error, and the process ends with exit code 1. Raises Stopped on all
    ranks if any of them received a signal to stop.
    """
    with join() as ranks:
        stopped_by = run(load(config, overrides), ranks, stop)
    if stopped_by:
        raise Stopped(stopped_by, is_first=ranks.is_first)


def run(config: RunConfig, ranks: Ranks, stop: StopRequest) -> int:
    """Train from the newest checkpoint, or from the start, to the last step, on all ranks together.

    Return 0, or the number of the signal that ended the run earlier.

    Raises ValueError for errors of the user: configuration, dataset, checkpoint, divergence, a second
    training in the run directory.
    """
    ranks.pulse.limit(config.watchdog.timeout_s)
    micro = micro_batch(config, ranks.world_size)
    rank_slice = RankSlice(ranks.rank, ranks.world_size, config.global_batch, micro)
    source = open_source(config.data)
    schedule = config.schedule(source.images)
    evaluation = Evaluation(
        config.verification_files(),
        config.evaluation.suite,
        config.data.image_size,
        config.evaluation.batch_size,
    )
    with run_lock.held(config.run_dir) if ranks.is_first else nullcontext():
        stopped_by = _train(config, schedule, ranks, stop, rank_slice, source, evaluation)
        if not stopped_by and ranks.is_first:
            ranks.pulse.note(schedule.steps, "writing the report", is_slow=True)
            conclude(
                config.run_dir,
                config_text=config.model_dump_json(indent=2),
                schedule=schedule,
                global_batch=config.global_batch,
                source=source,
                evaluation=evaluation,
                ranks=ranks,
            )
    return stopped_by


def _train(
    config: RunConfig,
    schedule: Schedule,
    ranks: Ranks,
    stop: StopRequest,
    rank_slice: RankSlice,
    source: Source,
    evaluation: Evaluation,
) -> int:
    """Build or resume the network and the head, and run the steps that are left; return as `run` does."""
    state, saved = build_or_resume(config, source, ranks, rank_slice.micro_batch)
    first_step, cursor = (saved.step, saved.cursor) if saved else (0, None)
    quarantine = Quarantine(config.run_dir / QUARANTINE_FILE, config.data.max_bad_share)
    make_loader = _loader_factory(config.seed, ranks, rank_slice, source, quarantine)
    with _run_log(config, schedule, ranks, quarantine, first_step) as log:
        if ranks.is_first_on_node:
            log.serve(config.metrics)
        log.say(_summary(schedule, ranks, rank_slice, source, first_step))
        checkpoints = Checkpoints(config, source, state, ranks, log)
        suspects = Suspects(config.data.path or [*map(redacted, config.data.shards)], config.head.scale)
        divergence = Divergence(config.skip_limit, config.rollback_limit, suspects)
        training = Training(
            ranks,
            stop,
            rank_slice,
            schedule,
            state,
            make_loader,
            evaluation,
            checkpoints,
            divergence,
            log,
            cursor,
        )
        stop.keep_deadline(
            config.checkpoint.deadline_s, is_first=ranks.is_first, tidy=training.give_up_saving
        )
        return training.execute(first_step)


def _run_log(
    config: RunConfig, schedule: Schedule, ranks: Ranks, quarantine: Quarantine, first_step: int
) -> RunLog:
    return RunLog(
        config.run_dir,
        steps=schedule.steps,
        first_step=first_step,
        global_batch=config.global_batch,
        quarantine=quarantine,
        is_first=ranks.is_first,
    )


def _summary(schedule: Schedule, ranks: Ranks, rank_slice: RankSlice, source: Source, first_step: int) -> str:
    return (
        f"{source.images or 'streamed'} images of {source.num_classes} identities; "
        f"{ranks.world_size} ranks on {ranks.device.type}, "
        f"{rank_slice.accumulation} x {rank_slice.micro_batch} images each; "
        f"steps {first_step} to {schedule.steps}"
    )


def _loader_factory(
    seed: int, ranks: Ranks, rank_slice: RankSlice, source: Source, quarantine: Quarantine
) -> MakeLoader:
    def make_loader(
        step: int, cursor: list[list[int]] | None, gather_labels: GatherLabels
    ) -> Loader | RemoteLoader:
        local = ranks.placement.local_world_size
        context = LoaderContext(rank_slice, seed, step, cursor, local, ranks.device_id)
        return source.loader(context, quarantine, gather_labels)

    return make_loader


def evaluate(
    path: Path, config: SuiteConfig, *, name: str, batch_size: int, out: Path | None
) -> Results | None:
    """Evaluate a network on the suite `name`; return the results and write them to the folder `out`.

    `path` is a checkpoint, a run (its newest checkpoint), or a network's file (.pt, .safetensors). Returns
    None on all ranks except rank 0.
    """
    with join() as ranks, _progress(ranks) as progress:
        if ranks.is_first and out is not None:
            out.mkdir(parents=True, exist_ok=True)  # an error here costs less than one after hours
        suite = Suite(config)
        found = network.network_of(path, ranks)
        embed = _with_autocast(found, ranks)
        results = suite.evaluate(Embedder(embed, found.image_size, batch_size, ranks, progress=progress))
        if ranks.is_first and out is not None:
            about = {
                "suite": name,
                "checkpoint": str(path),
                "step": found.step,
                "world_size": ranks.world_size,
                "device": device_name(ranks.device),
                "versions": versions(),
            }
            write(out, results, about)
    return results if ranks.is_first else None


def _progress(ranks: Ranks) -> AbstractContextManager[Callable[[int, int], None]]:
    return progress_bar("embedding") if ranks.is_first else nullcontext(lambda done, total: None)


def _with_autocast(found: network.Network, ranks: Ranks) -> Network:
    is_bf16 = uses_bf16(found.engine, ranks.device)

    @torch.inference_mode()
    def embed(images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=is_bf16):
            return found.model(images_BCHW).emb_BD.float()

    return embed
