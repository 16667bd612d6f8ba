"""A trained network, loaded from a run, a checkpoint or a file, and written to a file of its own.

    .pt             {"backbone": its configuration, "image_size": pixels, "step": n, "state": for
                    load_state_dict}: plain values and tensors, for `torch.load(file, weights_only=True)`
    .safetensors    the tensors of that state; the other three as texts in the metadata, with a description
                    of the input

No code in these files is executed: a .pt file is unpickled to plain values and tensors only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.common.atomic_write import staged_file
from trainer import backbones
from trainer.backbones import Backbone, BackboneConfig
from trainer.checkpoint import directory, sharded
from trainer.checkpoint.checksummed_file import naming_the_cause
from trainer.config import EngineConfig
from trainer.inference.optional_import import require
from trainer.runtime.ranks import Ranks, join
from trainer.saved_config import from_saved, translated_backbone

SAFETENSORS = ".safetensors"


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

    Raises CheckpointError if the checkpoint is missing or damaged, ValueError for a file without a network.
    """
    if path.is_file():
        network = read_network(path)
        network.model.to(ranks.device)
        return network
    found = sharded.locate(path, group=ranks.group)
    header = directory.read_manifest(found).header
    config = from_saved(header.config)
    model = backbones.build(config.backbone, config.data.image_size).to(ranks.device).eval()
    sharded.load(found, sharded.backbone_state(model), group=ranks.group)
    return Network(model, config.backbone, config.data.image_size, header.step, config.engine)


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
    content = _read_safetensors(file) if file.suffix == SAFETENSORS else _read_pt(file)
    try:
        config = backbones.parse(translated_backbone(content["backbone"]))
        image_size = int(content["image_size"])
        model = backbones.build(config, image_size)
        model.load_state_dict(content["state"])
        return Network(model.eval(), config, image_size, int(content["step"]))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _no_network(file, error) from error


def _read_pt(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise many kinds on damaged files
        raise _no_network(file, error) from error


def _read_safetensors(file: Path) -> dict[str, Any]:
    package = require("safetensors", "export")
    try:
        with package.safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return facts | {"backbone": json.loads(facts["backbone"]), "state": state}
    except (KeyError, ValueError, package.SafetensorError) as error:
        raise _no_network(file, error) from error


def _no_network(file: Path, error: Exception) -> ValueError:
    text = f"no {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]
    found = text or type(error).__name__
    return ValueError(
        f"{file}: expected a network that `lgaf checkpoint extract` or `lgaf export --out FILE{SAFETENSORS}` "
        f"wrote, found: {found}"
    )
