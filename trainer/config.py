"""A whole run: the rooms' configurations side by side, and the few keys that belong to none of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.config import DataConfig
from partial_fc.config import HeadConfig
from trainer import backbones
from trainer import config_file as settings

# Below it, oneDNN as torch 2.13 brings it crashes in the backward pass of strided 1x1 convolutions.
LEAST_CHANNELS_LAST_WIDTH = 16

# Keys that say where and how a run is executed, not what is computed: a continued run may change them.
MAY_CHANGE = (
    "run_dir",
    "micro_batch",
    "skip_limit",
    "rollback_limit",
    "log_every_steps",
    "data.path",
    "data.catalog_dir",
    "data.shards",
    "data.threads",
    "data.prefetch_batches",
    "data.max_bad_share",
    "backbone.recompute",
    "engine.zero_stage",
    "checkpoint",
    "evaluation",
    "metrics",
    "watchdog",
)


class Strict(BaseModel):
    """Unknown keys are errors; a configuration does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(Strict):
    """What moves the backbone, and the learning rate of backbone and head."""

    kind: Literal["sgd", "adamw"] = Field("sgd", description="what moves the backbone's weights")
    learning_rate: float = Field(0.1, gt=0, description="learning rate after the warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd; beta1 of adamw")
    beta2: float = Field(0.999, ge=0, lt=1, description="beta2 of adamw")
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="decay of the backbone's weights, norms, biases and PReLU slopes excepted: sgd adds this "
        "times a weight to its gradient, adamw takes this times the learning rate off the weight",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="norm to which the backbone's whole gradient is cut; by default it is not"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly")
    power: float = Field(2.0, ge=0, description="exponent of the polynomial decay after the warm-up")


class EngineConfig(Strict):
    """How the backbone runs on the devices."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what DeepSpeed ZeRO divides over the ranks: 1 moments, 2 gradients too, 3 weights too"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="type of the backbone's matrix products; auto is bf16 on a GPU that has it"
    )
    channels_last: bool = Field(
        False,
        description="keep the channels of a cell side by side in memory, which makes convolutions faster on "
        "GPUs with tensor cores and on CPUs",
    )
    compile: bool = Field(
        False,
        description="compile the backbone by torch.compile, which takes minutes at the start and needs a C++ "
        "compiler",
    )


class CheckpointConfig(Strict):
    """When the state of the run is saved."""

    every_steps: int = Field(1000, ge=1, description="steps between checkpoints; the last step has one too")
    keep: int = Field(3, ge=1, description="number of newest whole checkpoints that are kept")
    keep_every_steps: int | None = Field(
        None, ge=1, description="checkpoints at multiples of this step are kept for ever"
    )
    when_busy: Literal["wait", "skip"] = Field(
        "wait", description="what a checkpoint does that is due while the one before is still being written"
    )
    deadline_s: float = Field(
        60,
        gt=0,
        description="seconds from a signal to stop until the process ends; a checkpoint that is not done "
        "then is given up",
    )


class EvaluationConfig(Strict):
    """What the network is tested on before the first step, during training and after the last."""

    sets: list[Path] = Field(
        [],
        description="verification files (.bin); a relative one is looked for in the folders of data.path",
    )
    suite: Path | None = Field(
        None, description="file of more protocols (TOML), such as configs/eval/standard.toml"
    )
    every_steps: int = Field(2000, ge=1, description="steps between evaluations")
    batch_size: int = Field(64, ge=1, description="images embedded at once, per rank")


class MetricsConfig(Strict):
    """Prometheus metrics, served by one rank of every node while it trains."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to the network")
    port: int = Field(9400, ge=0, le=65535, description="TCP port; 0 takes any free one and says which")


class WatchdogConfig(Strict):
    """What ends a job of which a rank hangs."""

    timeout_s: float = Field(
        600,
        gt=0,
        description="seconds that a step may take; starting, the first step and saving may take three times "
        "as long, and evaluating, per batch; then the job ends and says which rank is behind",
    )


class RunConfig(Strict):
    """One training run."""

    run_dir: Path = Field(description="folder of the run: checkpoints, metrics, results, report")
    seed: int = Field(
        1, ge=0, lt=1 << 63, description="all randomness of the run is a function of it and of positions"
    )
    global_batch: int = Field(ge=1, description="images per step, over all ranks")
    micro_batch: int = Field(
        64, ge=1, description="most images that a rank takes at once; more per step are accumulated"
    )
    steps: int | None = Field(None, ge=1, description="length of the run in steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="length of the run in passes over the data")
    skip_limit: int = Field(
        20,
        ge=1,
        description="steps in a row that may be skipped, as their loss or gradient is not finite, "
        "before the run goes back to the newest checkpoint",
    )
    rollback_limit: int = Field(
        3,
        ge=0,
        description="times that the run goes back before it stops; it also stops if it gets no further then",
    )
    log_every_steps: int = Field(10, ge=1, description="steps between two looks at the losses")
    data: DataConfig
    backbone: backbones.AnyBackbone = Field(default_factory=backbones.default)
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="after")
    def _has_one_length(self) -> RunConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "expected a length, either `steps` or `epochs`, found "
                + ("neither" if self.steps is None else "both")
            )
        return self

    @model_validator(mode="after")
    def _engine_can_run_the_backbone(self) -> RunConfig:
        engine, backbone = self.engine, self.backbone
        if engine.compile and (engine.zero_stage == 3 or backbone.recompute):
            other = "engine.zero_stage = 3" if engine.zero_stage == 3 else "backbone.recompute"
            raise ValueError(
                f"engine.compile and {other}: expected at most one of them, as torch.compile does not see "
                "through what the other does around every block; set engine.compile = false"
            )
        narrowest = backbone.narrowest_convolution
        if engine.channels_last and narrowest is not None and narrowest < LEAST_CHANNELS_LAST_WIDTH:
            raise ValueError(
                f"engine.channels_last with backbone.width = {narrowest}: expected a width of at least "
                f"{LEAST_CHANNELS_LAST_WIDTH}, as oneDNN crashes with narrower convolutions of stride 2; "
                "widen the network, or set engine.channels_last = false"
            )
        return self

    def total_steps(self, images: int | None) -> int:
        """Steps of the run on a dataset of `images`; the last step of `epochs` is a whole one.

        Raises ValueError if the number of images is not known, None, and `epochs` is what is given.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if images is None:
            raise ValueError("epochs: of streamed shards nobody knows how many images they hold; set steps")
        return math.ceil(self.epochs * images / self.global_batch)

    def schedule(self, images: int | None) -> Schedule:
        """Return the schedule of the run on a dataset of `images`; raises as `total_steps` does."""
        return Schedule(
            self.seed,
            self.total_steps(images),
            self.log_every_steps,
            self.checkpoint.every_steps,
            self.evaluation.every_steps,
            self.optimizer,
        )

    def verification_files(self) -> dict[str, Path]:
        """Name of each verification set -> its file. Raises ValueError if two have one name."""
        return files_by_name([self._in_data(path) for path in self.evaluation.sets])

    def _in_data(self, path: Path) -> Path:
        candidates = [folder / path for folder in self.data.path] or [path]
        return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def load(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration file at `path`, changed by `key=value` overrides. Raises ValueError for mistakes."""
    return settings.load(RunConfig, path, overrides)


def files_by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Verification files by their names without `.bin`. Raises ValueError if two have one name."""
    named = {path.stem: path for path in files}
    if len(named) < len(files):
        raise ValueError(
            f"verification files {', '.join(map(str, files))}: expected different names; rename one"
        )
    return named


@dataclass(frozen=True)
class Schedule:
    """Number of steps of a run, intervals between its events in steps, and the learning rate of each step."""

    seed: int
    steps: int
    log_every: int
    save_every: int
    evaluate_every: int
    optimizer: OptimizerConfig

    def is_due(self, done: int, every_steps: int) -> bool:
        """Return whether something is due after `done` steps; after the last step everything is."""
        return done == self.steps or done % every_steps == 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.optimizer.learning_rate,
            warmup_steps=self.optimizer.warmup_steps,
            steps=self.steps,
            power=self.optimizer.power,
        )


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, power: float) -> float:
    """Return a rate that rises linearly to `peak` over `warmup_steps`, then falls as (steps left) ** power.

    Step 0 is the first; the last of `steps` still has a rate above 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    left = (steps - step) / max(1, steps - warmup_steps)
    return peak * max(0.0, left) ** power


def micro_batch(config: RunConfig, world_size: int) -> int:
    """The largest micro-batch within the configured one that divides a rank's part of the global batch.

    Raises ValueError, with the world sizes that work, if the global batch does not divide by the ranks.
    """
    per_rank, rest = divmod(config.global_batch, world_size)
    if rest:
        fitting = [n for n in range(1, config.global_batch + 1) if config.global_batch % n == 0]
        raise ValueError(
            f"a global_batch of {config.global_batch} does not divide by {world_size} ranks: use one of "
            f"{', '.join(map(str, fitting))} ranks, or a multiple of {world_size} as global_batch"
        )
    return next(m for m in range(min(per_rank, config.micro_batch), 0, -1) if per_rank % m == 0)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines `key: before -> now` of the keys that differ and matter to what is computed."""
    flat_before, flat_now = _flatten(before), _flatten(now)
    keys = [key for key in {**flat_before, **flat_now} if not _may_change(key)]
    return [
        f"{key}: {flat_before.get(key, 'absent')} -> {flat_now.get(key, 'absent')}"
        for key in keys
        if flat_before.get(key, "absent") != flat_now.get(key, "absent")
    ]


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
