"""A trained network, loaded from a run, a checkpoint or a file, and written to a file of its own.

    .pt             {"backbone": its configuration, "image_size": pixels, "step": n, "state": for
                    load_state_dict}: plain values and tensors, for `torch.load(file, weights_only=True)`
    .safetensors    the tensors of that state; the other three as texts in the metadata, with a description
                    of the input

No code in these files is executed: a .pt file is unpickled to plain values and tensors only. The network of a
stored configuration is first built without memory (torch's device "meta"), and its shapes are compared with
those of the stored tensors, so that it takes no more memory than they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from data_pipeline.common import bounded_json
from data_pipeline.common.atomic_write import staged_file
from data_pipeline.common.data_file import open_data_file
from trainer import backbones
from trainer.backbones import Backbone, BackboneConfig
from trainer.checkpoint import directory, pt_file, sharded
from trainer.checkpoint.checksummed_file import naming_the_cause
from trainer.config import EngineConfig
from trainer.inference.optional_import import require
from trainer.runtime.ranks import Ranks, join
from trainer.saved_config import from_saved, translated_backbone

SAFETENSORS = ".safetensors"
# The header of a safetensors file takes about 100 bytes for each tensor.
_LARGEST_HEADER = 8 << 20
_CONSTANTS = 100


class Network(NamedTuple):
    """A trained network in evaluation mode, its configuration, and the step at which it was saved.

    engine: the run's engine configuration; the default for a network that was read from a file.
    """

    model: Backbone
    config: BackboneConfig
    image_size: int
    step: int
    engine: EngineConfig = EngineConfig()

    def facts(self) -> dict[str, str]:
        """Return a description of the network, its input and its output, as texts for a file's metadata."""
        return {
            "backbone": self.config.model_dump_json(),
            "image_size": str(self.image_size),
            "step": str(self.step),
            "input": f"float32 [batch, 3, {self.image_size}, {self.image_size}], colours RGB, "
            "values (pixel - 127.5) / 127.5 in [-1, 1], faces aligned as in training",
            "output": f"float32 [batch, {self.config.embedding_size}], the embedding: compare directions "
            "(cosine similarity); the norm measures the quality of the image",
        }


def network_of(path: Path, ranks: Ranks) -> Network:
    """Load a network from a checkpoint, a run's newest intact checkpoint or a file, to each rank's device.

    Raises CheckpointError if the checkpoint is missing, damaged or too large for the memory, ValueError for a
    file without a network.
    """
    if path.is_file():
        network = read_network(path)
        network.model.to(ranks.device)
        return network
    found = sharded.locate(path, group=ranks.group)
    manifest = sharded.read_current_manifest(found)
    try:
        config = from_saved(manifest.header.config)
        empty = _empty(config.backbone, config.data.image_size, len(manifest.tensors))
    except Exception as error:  # torch and pydantic raise many kinds on absurd numbers
        raise directory.CheckpointError(
            f"{found}: expected the configuration of a run, found: {_first_line(error)}; use another "
            "checkpoint"
        ) from error
    sharded.require_tensors(found, sharded.backbone_state(empty))
    try:
        model = backbones.build(config.backbone, config.data.image_size).to(ranks.device).eval()
    except (RuntimeError, MemoryError) as error:
        raise directory.CheckpointError(
            f"{found}: expected enough memory for its network, found: {_first_line(error)}; free memory, or "
            "use another machine"
        ) from error
    sharded.load(found, sharded.backbone_state(model), group=ranks.group)
    return Network(model, config.backbone, config.data.image_size, manifest.header.step, config.engine)


def network_alone(path: Path) -> Network:
    """Load a network as `network_of` does, in a single process; on the GPU if there is one.

    An error is printed and ends the process with exit code 1.
    """
    with join() as ranks:
        if ranks.world_size > 1:
            raise ValueError(
                f"expected a single process, found {ranks.world_size}; start the command without a launcher"
            )
        return network_of(path, ranks)


def write_pt(network: Network, out: Path) -> None:
    """Move a network to the CPU and write it as .pt, whatever the suffix of `out`."""
    content = {
        "backbone": network.config.model_dump(mode="json"),
        "image_size": network.image_size,
        "step": network.step,
        "state": network.model.cpu().state_dict(),
    }
    # A Python file: torch's own file writer does not report why a write failed.
    with staged_file(out) as partial, open(partial, "wb") as file, naming_the_cause():
        torch.save(content, file)


def write_safetensors(network: Network, out: Path) -> None:
    """Write a network as .safetensors. Raises ValueError if the package is missing."""
    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    # Not with its save_file, which creates a file that other users cannot read.
    out.write_bytes(require("safetensors.torch", "export").save(state, network.facts()))


def load_backbone(file: Path) -> Backbone:
    """Read the network in a file, in evaluation mode. Raises ValueError if the file holds none."""
    return read_network(file).model


def read_network(file: Path) -> Network:
    """Read the network in a .pt or .safetensors file to the CPU. Raises ValueError if the file holds none."""
    if file.suffix == SAFETENSORS:
        require("safetensors", "export")
    try:
        content = _read_safetensors(file) if file.suffix == SAFETENSORS else pt_file.load(file)
        if not isinstance(content, dict):
            raise TypeError("no table")
        config = backbones.parse(translated_backbone(content["backbone"]))
        image_size, step, state = int(content["image_size"]), int(content["step"]), content["state"]
        _require_shapes(_empty(config, image_size, len(state)).state_dict(), state)
        model = backbones.build(config, image_size)
        model.load_state_dict(state)
    except Exception as error:  # torch's readers raise many kinds on damaged files
        raise _no_network(file, error) from error
    return Network(model.eval(), config, image_size, step)


def _empty(config: BackboneConfig, image_size: int, stored: int) -> Backbone:
    """Return the network without memory for its tensors.

    Raises ValueError while it is built if its parameters are far more than the `stored` tensors.
    """
    # Constants of the architecture are not stored in a checkpoint.
    most, found = 2 * stored + _CONSTANTS, itertools.count(1)

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(found) > most:
            raise ValueError(f"a configuration with more than {most} tensors, of which {stored} are stored")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return backbones.build(config, image_size)
    finally:
        hook.remove()


def _require_shapes(wanted: Mapping[str, torch.Tensor], state: Any) -> None:
    """Raise ValueError unless a file's tensors have the names and shapes of the network that it describes."""
    if not isinstance(state, Mapping) or not all(isinstance(one, torch.Tensor) for one in state.values()):
        raise ValueError("a state that is no table of tensors")
    for name in wanted.keys() | state.keys():
        of_file, of_network = (_shape(tensors.get(name)) for tensors in (state, wanted))
        if of_file != of_network:
            raise ValueError(f"{of_file} for {name!r}, for which its configuration has {of_network}")


def _shape(tensor: torch.Tensor | None) -> str:
    return "no tensor" if tensor is None else f"shape {tuple(tensor.shape)}"


def _read_safetensors(file: Path) -> dict[str, Any]:
    package = require("safetensors", "export")
    with open_data_file(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes, more than {_LARGEST_HEADER}")
    # The tensors are maps of the file.
    with package.safe_open(file, "pt") as opened:
        facts = opened.metadata() or {}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return facts | {"backbone": bounded_json.parse(facts["backbone"]), "state": state}


def _no_network(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: expected a network that `lgaf checkpoint extract` or `lgaf export --out FILE{SAFETENSORS}` "
        f"wrote, found: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False)[0]
        return ": ".join([".".join(map(str, first["loc"])), first["msg"]][not first["loc"] :])
    text = f"no {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]
    return text or type(error).__name__
