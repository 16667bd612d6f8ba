"""Small networks that have seen a few images, so that no statistic has its initial value."""

from __future__ import annotations

import torch

from trainer.backbones import build, parse
from trainer.inference.network import Network

STEP = 7


def small_network(name: str = "lgaf", image_size: int = 32, **keys: object) -> Network:
    """A network as it comes out of training: evaluation mode, statistics moved."""
    settings = {
        "name": name,
        "blocks": (1, 1, 1, 1),
        "width": 8,
        "embedding_size": 16,
    }
    if name == "lgaf":
        settings |= {"mhms": {"heads": ((1, 3),), "attention_reduction": 4}, "lgf": {"momentum": 0.5}}
    config = parse(settings | keys)
    torch.manual_seed(0)
    model = build(config, image_size)
    with torch.no_grad():
        for _ in range(3):
            model.update_statistics(model(random_images(8, image_size)).norm_BK)
    return Network(model.eval(), config, image_size, STEP)


def random_images(count: int, image_size: int, seed: int = 1) -> torch.Tensor:
    """images_BCHW in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, image_size, image_size, generator=generator) * 2 - 1


def embedded(network: Network, images_BCHW: torch.Tensor) -> torch.Tensor:
    """emb_BD by the network itself."""
    with torch.no_grad():
        return network.model(images_BCHW).emb_BD
