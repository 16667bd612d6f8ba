"""The backbone on its devices: DeepSpeed ZeRO, mixed precision, SGD or AdamW. The only import of deepspeed.

    features = engine.forward(images_BCHW)                           remembers what backward needs
    engine.backward(emb_BN, grad_BN, features.penalty, share=1 / A)  adds to the gradients
    engine.step(learning_rate) -> bool                               averages over ranks, updates, forgets

Steps end where `step` is called, however many micro-batches there were (DeepSpeed's unmanaged accumulation).
Weights stay float32 at every ZeRO stage; bfloat16 is autocast's, so norms and moments do not lose digits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from unittest import mock

import torch

# Read when DeepSpeed is imported; it would look for a GPU itself, and warn where there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.utils.numa
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from trainer.backbones import Backbone, Features, parameter_groups
from trainer.config import EngineConfig, OptimizerConfig

# What an optimizer keeps per parameter: name in a checkpoint, the same as the head's, and name in torch.
_MOMENTS = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"},
}
# And per tensor that it moves at once: the updates that it has had, which correct AdamW's moments.
_UPDATES = "step"

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls torch's collectives by names that have newer ones.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
# Compiled at the first use on a CPU, for collectives that are not used here; and a process that is killed
# while it compiles leaves a lock behind for which all later runs would wait.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# It would run `numactl`, again and again, to count devices that a CPU has not; and a PATH with a folder that
# one may not read ends the training then.
deepspeed.utils.numa.get_numa_cores = lambda: []
# An optimizer that is not used here, which DeepSpeed imports with any. It asks for three compiled functions,
# and that imports torch's compiler: 1.3 of the 6.9 s after which a small training ended its first step.
with contextlib.suppress(ImportError), mock.patch("torch.compile", lambda function: function):
    import deepspeed.runtime.zero.muon.muon_optimizer


class Engine:
    """A backbone being trained. `model` is given with its initial weights, the same on all ranks."""

    def __init__(
        self,
        model: Backbone,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        micro_batch: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.device = device
        self._group, self._world_size = group, dist.get_world_size(group)
        self._names = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._stage = engine.zero_stage
        self._moments = _MOMENTS[optimizer.kind]
        self._optimizer = _optimizer(model, optimizer, looks_itself=self._stage == 0)
        self._layout = torch.channels_last if engine.channels_last else torch.preserve_format
        if engine.compile:
            _compile(model)
        self.is_bf16 = uses_bf16(engine, device)
        self._engine = _initialize(
            model, self._optimizer, optimizer.clip_norm, self.is_bf16, self._stage, micro_batch, device
        )
        self.model = model
        self._buffers = list(model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        self._create_moments()

    def forward(self, images_BCHW: torch.Tensor) -> Features:
        """What the network says of this rank's images, attached to the graph; embeddings in float32."""
        features: Features = self._engine(images_BCHW.to(memory_format=self._layout))
        return features._replace(emb_BD=features.emb_BD.float())

    def backward(
        self,
        emb_BN: torch.Tensor,
        grad_BN: torch.Tensor,
        penalty: torch.Tensor | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        """Continue from the gradient of the global mean loss with respect to this rank's embeddings.

        emb_BN: attached, float32; all that the loss looked at of an image, side by side.
        penalty: a mean over this rank's images, to be part of the loss; share: that of this micro-batch in
        the step, by which the penalty alone is multiplied.

        DeepSpeed averages the ranks' gradients, where the loss, a mean over all ranks' samples, needs their
        sum: the number of ranks is put back here, and only here. Of penalties it is the average that is due.
        """
        # DeepSpeed takes scalars at every stage; the gradient of this one for emb_BN is the factor itself.
        loss = (emb_BN * (grad_BN * self._world_size)).sum()
        self._engine.backward(loss if penalty is None else loss + share * penalty)

    def step(self, learning_rate: float) -> bool:
        """Update the weights from the gradients of all micro-batches since `train`; True if that was done.

        False, on all ranks, if any rank's gradient has a number that is not finite: the averages that the
        ranks share then have one, and nothing moves. Statistics of the forward passes since `train` are
        undone too.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        is_done: bool = self._engine.was_step_applied()
        if not is_done:
            for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
                buffer.copy_(before)
        return is_done

    def synchronize_statistics(self) -> None:
        """Replace BatchNorm's running statistics by their mean over the ranks.

        Training does not read them, and a running mean is linear: when this is done makes no difference.
        """
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        dist.all_reduce(statistic.div_(self._world_size), group=self._group)

    def train(self) -> None:
        """Batch statistics, dropout: for the micro-batches of the next step."""
        self._engine.train()
        for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
            before.copy_(buffer)

    @torch.no_grad()
    def embed(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 [B, D] for evaluation; at ZeRO stage 3 all ranks must call it equally often."""
        self._engine.eval()
        emb_BD: torch.Tensor = self._engine(images_BCHW.to(memory_format=self._layout)).emb_BD
        return emb_BD.float()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """The backbone's parts of a checkpoint, whole tensors on every rank: weights, moments, buffers; with
        AdamW the number of updates too, which skipped steps are not.

        All ranks must call it together.
        """
        state = {
            "backbone_weight": {name: self._weight(parameter) for name, parameter in self._names.items()},
            "backbone_buffer": dict(self.model.named_buffers()),
        }
        for part, key in self._moments.items():
            state[f"backbone_{part}"] = {
                name: self._moment(parameter, key) for name, parameter in self._names.items()
            }
        if self._counts_updates:
            state["backbone_updates"] = {"count": self._optimizer.state[self._moved[0]][_UPDATES].clone()}
        return state

    def load_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Go on from what `state` returned, or was loaded into it, between two steps; on all ranks."""
        for name, parameter in self._names.items():
            self._set_weight(parameter, state["backbone_weight"][name])
            for part, key in self._moments.items():
                self._set_moment(parameter, key, state[f"backbone_{part}"][name])
        if self._counts_updates:
            for moved in self._moved:
                self._optimizer.state[moved][_UPDATES].copy_(state["backbone_updates"]["count"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["backbone_buffer"][name])

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Both what the network computes with and what the optimizer moves."""
        if self._stage == 3:
            part = self._own_part(parameter, value)
            safe_set_local_fp32_param(parameter, part)
            own: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            own.copy_(part)
        elif self._stage > 0:
            safe_set_full_fp32_param(parameter, value)
        # At stage 3 only small tensors are kept whole; the others are empty between the steps.
        if parameter.shape == value.shape:
            parameter.copy_(value)

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach() if self._stage == 0 else safe_get_full_fp32_param(parameter)

    def _moment(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        if self._stage == 0:
            return self._optimizer.state[parameter][key]
        return safe_get_full_optimizer_state(parameter, key)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if self._stage == 0:
            self._moment(parameter, key).copy_(value)
        elif self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _create_moments(self) -> None:
        """Moments before the first step, which is when torch would make them.

        DeepSpeed (0.19) links parameters to their moments at the first step of the first parameter group,
        when those of the other groups do not exist yet: made here, they can be saved and loaded at any time.
        """
        zero = self._engine.optimizer
        self._moved: list[torch.Tensor] = [
            p for group in self._optimizer.param_groups for p in group["params"]
        ]
        if self._stage == 3:
            self._moved = zero.fp32_partitioned_groups_flat
        self._counts_updates = isinstance(self._optimizer, torch.optim.AdamW)
        for moved in self._moved:
            state = self._optimizer.state[moved]
            if self._counts_updates:
                state[_UPDATES] = torch.zeros(())
            for key in self._moments.values():
                state[key] = torch.zeros_like(moved.detach())
        if self._stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def _own_part(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor at stage 3, with zeros at the end of the last.

        DeepSpeed's setters of whole tensors do not take those that do not divide by the ranks.
        """
        own: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        part, rank = own.numel(), dist.get_rank(self._group)
        padded = nn.functional.pad(value.flatten(), (0, part * self._world_size - value.numel()))
        return padded[rank * part :][:part]


class _Finite(torch.optim.Optimizer):
    """Does not move if a gradient is not finite; `overflow` is how DeepSpeed asks about it.

    Only for gradients that are averaged over the ranks already: then all ranks see the same.
    """

    overflow = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not torch.stack([grad.sum() for grad in grads]).isfinite().all()
        if not self.overflow:
            super().step(closure)


class _FiniteSGD(_Finite, torch.optim.SGD):
    """torch's SGD, for stage 0."""


class _FiniteAdamW(_Finite, torch.optim.AdamW):
    """torch's AdamW, for stage 0."""


def _optimizer(model: Backbone, config: OptimizerConfig, *, looks_itself: bool) -> torch.optim.Optimizer:
    """torch's optimizer; DeepSpeed looks at the gradients where it owns them, from stage 1 on."""
    groups, rate = parameter_groups(model, config.weight_decay), config.learning_rate
    if config.kind == "adamw":
        betas = (config.momentum, config.beta2)
        return (_FiniteAdamW if looks_itself else torch.optim.AdamW)(groups, lr=rate, betas=betas)
    return (_FiniteSGD if looks_itself else torch.optim.SGD)(groups, lr=rate, momentum=config.momentum)


def _initialize(
    model: Backbone,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    is_bf16: bool,
    stage: int,
    micro_batch: int,
    device: torch.device,
) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": stage},
        # 0 is off; DeepSpeed's own default clips.
        "gradient_clipping": clip_norm or 0.0,
        # torch's SGD is not on DeepSpeed's list; tests/trainer compares it with a plain step at each stage.
        "zero_allow_untested_optimizer": True,
        # No modules whose gradients would be sent in bfloat16: they are summed in float32, as they are kept.
        "torch_autocast": {"enabled": is_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    engine, *_ = deepspeed.initialize(
        model=model.to(device), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _compile(model: Backbone) -> None:
    """Compile in place, so that modules and parameters keep their names, at the first images.

    Raises ValueError if there is no C++ compiler, which torch would notice in the middle of a step.
    """
    # Only who compiles waits for these to be imported.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "engine.compile needs a C++ compiler, found none: install g++, name another in the environment "
            "variable CXX, or set engine.compile = false"
        ) from error
    model.compile()


def uses_bf16(config: EngineConfig, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16. Raises ValueError if it is demanded and not supported."""
    supported = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and not supported:
        raise ValueError(f"engine.precision is bf16, which {device} does not support; set it to auto or fp32")
    # A CPU can compute in bfloat16, but without special units more slowly than in float32.
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and supported)
