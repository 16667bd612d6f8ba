"""A small LGAF on which the tests of this room agree."""

import pytest
import torch

from trainer.backbones import BackboneConfig, build
from trainer.backbones.lgaf import LGAF, LGAFConfig, LGFConfig, MHMSConfig

IMAGE_SIZE = 32


@pytest.fixture
def config() -> BackboneConfig:
    return LGAFConfig(
        blocks=(1, 2, 1, 1),
        width=8,
        embedding_size=16,
        mhms=MHMSConfig(heads=((1, 3), (5,)), attention_reduction=2),
        lgf=LGFConfig(momentum=0.1, branch_share=0),
    )


@pytest.fixture
def lgaf(config) -> LGAF:
    torch.manual_seed(0)
    return build(config, IMAGE_SIZE)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
