"""Networks: plain modules that know nothing of ranks."""

from __future__ import annotations

from trainer.backbones.base import Backbone, Features, parameter_groups
from trainer.backbones.config import BackboneConfig
from trainer.backbones.iresnet import IResNet
from trainer.backbones.lgaf import LGAF
from trainer.backbones.vit import ViT

__all__ = ["Backbone", "BackboneConfig", "Features", "build", "parameter_groups"]


def build(config: BackboneConfig, image_size: int) -> Backbone:
    """The network that `config` describes, for images of `image_size` pixels, initialised at random."""
    if config.name == "vit":
        return ViT(
            config.vit,
            image_size,
            embedding_size=config.embedding_size,
            dropout=config.dropout,
            recompute=config.recompute,
        )
    trunk = IResNet(
        config.stage_blocks,
        image_size,
        width=config.width,
        stem_stride=config.stem_stride,
        embedding_size=config.embedding_size,
        dropout=config.dropout,
        recompute=config.recompute,
    )
    if config.name == "iresnet":
        return trunk
    return LGAF(trunk, config.mhms, config.lgf, config.dropout, config.recompute, config.local_only)
