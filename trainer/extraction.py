"""The network of a checkpoint as one file that needs nothing else of the run.

    {"backbone": its configuration, "image_size": pixels, "step": n, "state": for load_state_dict}

Only plain values and tensors: `torch.load(file, weights_only=True)` reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from trainer import backbones, checkpoint, checkpoint_files
from trainer.backbones import Backbone, BackboneConfig
from trainer.config import RunConfig
from trainer.distributed import join


def extract(path: Path, out: Path) -> None:
    """Write the backbone of a checkpoint, or of a run's newest whole one, to the file `out`.

    A failure is printed and ends the process with exit code 1.
    """
    with join() as ranks:
        found = checkpoint.locate(path, group=ranks.group)
        header = checkpoint_files.read_manifest(found).header
        config = RunConfig.model_validate(header.config)
        model = backbones.build(config.backbone, config.data.image_size)
        checkpoint.load(found, checkpoint.backbone_state(model), group=ranks.group)
        content = {
            "backbone": config.backbone.model_dump(mode="json"),
            "image_size": config.data.image_size,
            "step": header.step,
            "state": model.state_dict(),
        }
        if ranks.is_first:
            partial = out.with_name(out.name + ".part")
            torch.save(content, partial)
            os.replace(partial, out)


def load_backbone(file: Path) -> Backbone:
    """The network in a file that `extract` has written."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    model = backbones.build(BackboneConfig.model_validate(content["backbone"]), content["image_size"])
    model.load_state_dict(content["state"])
    return model
