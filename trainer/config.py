"""Configuration of a run: the tables of its parts, and the keys and the schedule of the run itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_pipeline.config import DataConfig
from partial_fc.config import HeadConfig
from trainer import backbones, config_file

# With narrower convolutions, oneDNN in torch 2.13 crashes in the backward pass of strided 1x1 convolutions.
LEAST_CHANNELS_LAST_WIDTH = 16

# Keys that affect the execution of a run and not its result: a resumed run may change them.
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
    "data.max_sample_mb",
    "backbone.recompute",
    "engine.zero_stage",
    "checkpoint",
    "evaluation",
    "metrics",
    "watchdog",
)


class Strict(BaseModel):
    """An immutable table that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(Strict):
    """The keys that all optimizers of the backbone have; backbone and head share the learning rate."""

    kind: str
    learning_rate: float = Field(0.1, gt=0, description="learning rate after the warm-up")
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="weight decay of the backbone, except for norms, biases and PReLU slopes: sgd adds this "
        "times a weight to its gradient, adamw subtracts this times the learning rate times the weight",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the whole backbone's gradient; by default it is not clipped"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly")
    power: float = Field(2.0, ge=0, description="exponent of the polynomial decay after the warm-up")


class SGDConfig(OptimizerConfig):
    """SGD with momentum."""

    kind: Literal["sgd"] = Field("sgd", description="SGD with momentum")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum")


class AdamWConfig(OptimizerConfig):
    """AdamW."""

    kind: Literal["adamw"] = Field("adamw", description="AdamW")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")


def _with_kind(value: Any) -> Any:
    """Take a table without a `kind` as that of sgd."""
    return {"kind": "sgd", **value} if isinstance(value, dict) else value


# The configuration of either optimizer, chosen by `kind`.
AnyOptimizer = Annotated[SGDConfig | AdamWConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)]


class EngineConfig(Strict):
    """Execution of the backbone on the devices."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="stage of DeepSpeed ZeRO: 1 divides the moments over the ranks, 2 also the gradients, "
        "3 also the weights",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="type of the backbone's matrix products; auto is bf16 on a GPU that supports it"
    )
    channels_last: bool = Field(
        False,
        description="channels-last memory layout, which makes convolutions faster on GPUs with tensor cores "
        "and on CPUs",
    )
    compile: bool = Field(
        False,
        description="compile the backbone by torch.compile, which takes minutes at the start and needs a C++ "
        "compiler",
    )


class CheckpointConfig(Strict):
    """Intervals of checkpoints, and the number to keep."""

    every_steps: int = Field(
        1000, ge=1, description="steps between checkpoints; the last step is always saved"
    )
    keep: int = Field(3, ge=1, description="number of newest intact checkpoints to keep")
    keep_every_steps: int | None = Field(
        None, ge=1, description="checkpoints at multiples of this step are kept forever"
    )
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description="what to do when a checkpoint is due while the previous one is still being written: wait "
        "for it, or skip the new one",
    )
    deadline_s: float = Field(
        60,
        gt=0,
        description="seconds from a signal to stop until the process ends; a checkpoint that is still being "
        "written then is removed",
    )


class EvaluationConfig(Strict):
    """Evaluation of the network before the first step, during training and after the last step."""

    sets: list[Path] = Field(
        [],
        description="verification files (.bin); relative paths are searched in the folders of data.path",
    )
    suite: Path | None = Field(
        None, description="file of more protocols (TOML), such as configs/eval/standard.toml"
    )
    every_steps: int = Field(2000, ge=1, description="steps between evaluations")
    batch_size: int = Field(64, ge=1, description="images embedded at once, per rank")


class MetricsConfig(Strict):
    """Prometheus metrics, served by one rank of every node during training."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to the network")
    port: int = Field(9400, ge=0, le=65535, description="TCP port; 0 takes any free one and prints it")


class WatchdogConfig(Strict):
    """End of the job when a rank hangs."""

    timeout_s: float = Field(
        600,
        gt=0,
        description="seconds that a step may take, and three times that for the start, the first step, a "
        "save and each batch of an evaluation; after that the job ends and names the rank that is behind",
    )


class RunConfig(Strict):
    """One training run."""

    run_dir: Path = Field(description="folder of the run: checkpoints, metrics, results, report")
    seed: int = Field(
        1, ge=0, lt=1 << 63, description="every random choice is a function of the seed and a position"
    )
    global_batch: int = Field(ge=1, description="images per step, over all ranks")
    micro_batch: int = Field(
        64, ge=1, description="largest number of images per rank and micro-batch; a step accumulates several"
    )
    steps: int | None = Field(None, ge=1, description="length of the run in steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="length of the run in passes over the data")
    skip_limit: int = Field(
        20,
        ge=1,
        description="number of consecutive steps with a non-finite loss or gradient, which are skipped, "
        "after which the run returns to the newest checkpoint",
    )
    rollback_limit: int = Field(
        3,
        ge=0,
        description="number of returns to a checkpoint after which the run ends; it also ends if a return "
        "leads to no progress",
    )
    log_every_steps: int = Field(10, ge=1, description="steps between two records of the losses")
    data: DataConfig
    backbone: backbones.AnyBackbone = Field(default_factory=backbones.default)
    head: HeadConfig = HeadConfig()
    optimizer: AnyOptimizer = SGDConfig()
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
                f"engine.compile and {other}: expected at most one of them, as torch.compile cannot trace "
                "the hooks that the other adds to every block; set engine.compile = false"
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
        """Return the number of steps on a dataset of `images`; the last step of `epochs` is a full one.

        Raises ValueError if the number of images is unknown (None) and the length is given in epochs.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if images is None:
            raise ValueError(
                "epochs: expected a dataset of known size, found streamed shards, whose number of images is "
                "unknown; set steps instead"
            )
        return math.ceil(self.epochs * images / self.global_batch)

    def schedule(self, images: int | None) -> Schedule:
        """Return the schedule of the run on a dataset of `images`. Raises the errors of `total_steps`."""
        return Schedule(
            self.seed,
            self.total_steps(images),
            self.log_every_steps,
            self.checkpoint.every_steps,
            self.evaluation.every_steps,
            self.optimizer,
        )

    def verification_files(self) -> dict[str, Path]:
        """Return the file of each verification set by name. Raises ValueError if two have the same name."""
        return files_by_name([self._in_data(path) for path in self.evaluation.sets])

    def _in_data(self, path: Path) -> Path:
        candidates = [folder / path for folder in self.data.path] or [path]
        return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def load(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Load a configuration file, changed by `key=value` overrides. Raises ValueError if it is invalid."""
    return config_file.load(RunConfig, path, overrides)


def files_by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Return the files by name without `.bin`. Raises ValueError if two have the same name."""
    named = {path.stem: path for path in files}
    if len(named) < len(files):
        raise ValueError(
            f"verification files {', '.join(map(str, files))}: expected different names; rename one"
        )
    return named


@dataclass(frozen=True)
class Schedule:
    """Number of steps of a run, intervals of its events in steps, and the learning rate of each step."""

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
    """Return the largest divisor of a rank's part of the global batch up to the configured micro-batch.

    Raises ValueError, with the valid world sizes, if the world size does not divide the global batch.
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
    """Return a line `key: before -> now` for each differing key that affects the result."""
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
