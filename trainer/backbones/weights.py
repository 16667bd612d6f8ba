"""Initial weights from a file: a published checkpoint of InsightFace, or one of `lgaf checkpoint extract`.

    file -> state dict -> the network or its global branch, whichever has these names

Names, shapes and constants are compared first, so that no weight is changed by a file of another network.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.backbones.base import Backbone
from trainer.checkpoint import pt_file
from trainer.checkpoint.checksummed_file import FileSum

_SHOWN = 5


def load(model: Backbone, file: Path) -> int:
    """Set the weights of `model`, or of its global branch, to those in `file`; return the file's CRC-32.

    The file is a state dict with the network's names (for iresnet and vit those of InsightFace's
    arcface_torch), or a file of `lgaf checkpoint extract`.

    Raises ValueError, naming the file and the first tensors that differ, if it is of another network.
    """
    state, crc32 = _read(file)
    target = max((model, model.global_branch), key=lambda part: len(part.state_dict().keys() & state.keys()))
    faults = _faults(target, state)
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(
            f"backbone.weights = {file}: expected the weights of the network in [backbone], found those of "
            f"another: {'; '.join(faults[:_SHOWN])}{more}; use its configuration, or another file"
        )
    target.load_state_dict(state)
    return crc32


def _read(file: Path) -> tuple[dict[str, Tensor], int]:
    try:
        crc32 = int(FileSum.of(file.resolve()).crc32, 16)
        state = pt_file.load(file)
    except Exception as error:  # torch's readers raise many kinds on damaged files
        raise ValueError(
            f"backbone.weights = {file}: expected a state dict written by torch.save, found: "
            f"{type(error).__name__} {str(error).partition(chr(10))[0]}; "
            "copy it again if it is truncated"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state"), dict):
        state = state["state"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"backbone.weights = {file}: expected a dictionary of tensors by name, or a file of `lgaf "
            "checkpoint extract`, found other values; save only the network's state_dict()"
        )
    return state, crc32


def _faults(target: nn.Module, state: dict[str, Tensor]) -> list[str]:
    own = target.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is unexpected" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        return faults
    # Constants of the architecture are not saved in a run's checkpoints, so that another value would be lost.
    return [
        f"{name} differs from the network's constant {constant.flatten()[0].item():g}"
        for name, constant in target.named_parameters()
        if not constant.requires_grad and not torch.equal(state[name].to(constant), constant)
    ]
