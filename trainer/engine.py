"""Training of the backbone with DeepSpeed ZeRO, mixed precision, SGD or AdamW. The only import of deepspeed.

    features = engine.forward(images_BCHW)                           keeps the graph for the backward pass
    engine.backward(emb_BN, grad_BN, features.penalty, share=1 / A)  adds to the gradients
    engine.step(learning_rate) -> bool                               averages over ranks, updates, clears

A step ends when `step` is called, after any number of micro-batches (DeepSpeed's unmanaged accumulation).
Weights stay float32 at every ZeRO stage, and so do norms and moments: only autocast uses bfloat16.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

# DeepSpeed reads this variable on import; if it is unset, DeepSpeed searches for a GPU and warns without one.
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
from trainer.config import AdamWConfig, AnyOptimizer, EngineConfig

# The moments that an optimizer keeps per parameter: name in a checkpoint (as for the head) -> name in torch.
_MOMENTS = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"},
}
# The optimizer's count of updates of a tensor, for AdamW's bias correction.
_UPDATES = "step"

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls torch's collectives by deprecated names.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
# On first access DeepSpeed runs the `gcc` of the PATH, to list in this table the ops that it could compile.
# None is used here. It would compile "deepspeed_shm_comm" at its first use on a CPU, for collectives. If
# that process is killed, it leaves a lock file behind, and all later runs hang on it.
deepspeed.ops.__compatible_ops__ = {}
# DeepSpeed would run `numactl` repeatedly to count devices that a CPU does not have. It would also fail if
# PATH contains a folder without read permission.
deepspeed.utils.numa.get_numa_cores = lambda: []
# DeepSpeed imports the Muon optimizer, which is not used here. Muon compiles three functions and so imports
# torch's compiler: 1.3 of the 6.9 s that a small training needed up to the end of its first step.
with contextlib.suppress(ImportError), mock.patch("torch.compile", lambda function: function):
    import deepspeed.runtime.zero.muon.muon_optimizer


class Engine:
    """A backbone in training. `model` must have the same initial weights on all ranks."""

    def __init__(
        self,
        model: Backbone,
        engine: EngineConfig,
        optimizer: AnyOptimizer,
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
        self._optimizer = _optimizer(model, optimizer, checks_gradients=self._stage == 0)
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
        """Run the forward pass on this rank's images; return features on the graph, embeddings in float32."""
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
        """Run the backward pass from the loss gradient with respect to this rank's embeddings.

        emb_BN: float32, on the graph; all embeddings of an image that enter the loss, concatenated.
        grad_BN: the gradient of the global mean loss with respect to emb_BN.
        penalty: a mean over this rank's images that is added to the loss.
        share: the share of this micro-batch in the step; only the penalty is multiplied by it.
        """
        # DeepSpeed averages gradients over the ranks. The loss is a mean over all ranks' samples and needs
        # their sum, so that the gradient is multiplied by the number of ranks here, and only here. A penalty
        # is a mean over one rank's images and needs the average. DeepSpeed expects a scalar at every stage;
        # the gradient of this scalar with respect to emb_BN is the factor itself.
        loss = (emb_BN * (grad_BN * self._world_size)).sum()
        self._engine.backward(loss if penalty is None else loss + share * penalty)

    def step(self, learning_rate: float) -> bool:
        """Update the weights from the gradients of all micro-batches since `train`; return True if updated.

        Return False on all ranks, and update nothing, if any rank's gradient has a non-finite value: it makes
        the average over the ranks non-finite. BatchNorm statistics are reset to their values at `train`.
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

        It may be called at any time: training does not read the statistics, and a running mean is linear.
        """
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        dist.all_reduce(statistic.div_(self._world_size), group=self._group)

    def train(self) -> None:
        """Enable batch statistics and dropout for the micro-batches of the next step."""
        self._engine.train()
        for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
            before.copy_(buffer)

    @torch.no_grad()
    def embed(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return embeddings float32 [B, D] in evaluation mode.

        At ZeRO stage 3 all ranks must call it equally often.
        """
        self._engine.eval()
        emb_BD: torch.Tensor = self._engine(images_BCHW.to(memory_format=self._layout)).emb_BD
        return emb_BD.float()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the backbone's parts of a checkpoint: weights, moments, buffers; full tensors on every rank.

        With AdamW the state includes the number of updates, which does not count skipped steps. All ranks
        must call it together.
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
        """Load a state in the form that `state` returns, between two steps, on all ranks."""
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
        """Set the network's parameter and the optimizer's copy of it."""
        if self._stage == 3:
            part = self._own_part(parameter, value)
            safe_set_local_fp32_param(parameter, part)
            own: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            own.copy_(part)
        elif self._stage > 0:
            safe_set_full_fp32_param(parameter, value)
        # At stage 3 only small parameters are complete on each rank; the others are empty between steps.
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
        """Create all moments before the first step, so that they can be saved and loaded at any time.

        torch creates them during the first step. DeepSpeed (0.19) links parameters to their moments at the
        first step of the first parameter group, when the moments of the other groups do not exist yet.
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
        """Return this rank's part of a tensor at stage 3; the last part is padded with zeros.

        DeepSpeed's setters of full tensors reject sizes that the number of ranks does not divide.
        """
        own: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        part, rank = own.numel(), dist.get_rank(self._group)
        padded = nn.functional.pad(value.flatten(), (0, part * self._world_size - value.numel()))
        return padded[rank * part :][:part]


class _Finite(torch.optim.Optimizer):
    """An optimizer that skips its update if a gradient is non-finite; DeepSpeed reads `overflow`.

    The gradients must be averaged over the ranks already, so that all ranks decide alike.
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


def _optimizer(model: Backbone, config: AnyOptimizer, *, checks_gradients: bool) -> torch.optim.Optimizer:
    """Build torch's optimizer; from stage 1 on, DeepSpeed owns the gradients and checks them itself."""
    groups, rate = parameter_groups(model, config.weight_decay), config.learning_rate
    if isinstance(config, AdamWConfig):
        betas = (config.beta1, config.beta2)
        return (_FiniteAdamW if checks_gradients else torch.optim.AdamW)(groups, lr=rate, betas=betas)
    return (_FiniteSGD if checks_gradients else torch.optim.SGD)(groups, lr=rate, momentum=config.momentum)


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
        # 0 disables clipping; DeepSpeed's default clips.
        "gradient_clipping": clip_norm or 0.0,
        # torch's SGD is not on DeepSpeed's list of tested optimizers; tests/trainer compares it with a plain
        # step at each stage.
        "zero_allow_untested_optimizer": True,
        # An empty list: no module's gradients are reduced in bfloat16, all are reduced in float32.
        "torch_autocast": {"enabled": is_bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    engine, *_ = deepspeed.initialize(
        model=model.to(device), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _compile(model: Backbone) -> None:
    """Compile the model in place, at its first batch; modules and parameters keep their names.

    Raises ValueError if there is no C++ compiler, or if the path of torch has a space, which torch does not
    quote for the compiler; torch would report either only in the middle of a step.
    """
    # Imported here: the imports are slow, and only compilation needs them.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "engine.compile needs a C++ compiler, found none: install g++, name another in the environment "
            "variable CXX, or set engine.compile = false"
        ) from error
    if " " in torch.__file__:
        raise ValueError(
            f"engine.compile: expected torch in a folder without spaces in its path, found {torch.__file__}; "
            "move the environment, or set engine.compile = false"
        )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiler_cache())
    model.compile()


def _compiler_cache() -> str:
    """Return a folder that only this user can write.

    torch unpickles the files of its cache, by default a folder of /tmp that another user can create first.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lgaf" / "compiled"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
        is_private = (
            found.st_uid == os.geteuid() and not found.st_mode & 0o022 and stat.S_ISDIR(found.st_mode)
        )
    except OSError:  # such as a home that cannot be written
        is_private = False
    # torch does not quote this path for the compiler either.
    if is_private and os.access(place, os.W_OK) and " " not in str(place):
        return str(place)
    return tempfile.mkdtemp(prefix="lgaf-compiled-")


def uses_bf16(config: EngineConfig, device: torch.device) -> bool:
    """Return True if matrix products run in bfloat16.

    Raises ValueError if the configuration requires bfloat16 and the device does not support it.
    """
    supported = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and not supported:
        raise ValueError(f"engine.precision is bf16, which {device} does not support; set it to auto or fp32")
    # A CPU without dedicated units computes more slowly in bfloat16 than in float32.
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and supported)
