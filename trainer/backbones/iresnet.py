"""InsightFace's IResNet: improved residual blocks, and a linear layer over all cells of the last map.

    images -> stem -> four stages, each halving the side -> BN, dropout, fc, BN -> embedding

Names, shapes and initialisation of the parameters are InsightFace's (recognition/arcface_torch/backbones/
iresnet.py), so that published checkpoints can be loaded here and checkpoints of this project there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from trainer.backbones.base import Backbone, BackboneConfig, Features, check_size
from trainer.backbones.recompute import run

STAGES = 4
STAGE_NAMES = [f"layer{number}" for number in range(1, STAGES + 1)]
_CONV_STD = 0.1

Depth = Literal[18, 34, 50, 100, 200]

# Blocks of the four stages, as in InsightFace's iresnet18 to iresnet200.
BLOCKS_OF_DEPTH: dict[Depth, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class TrunkConfig(BackboneConfig):
    """The keys of a network whose trunk is an IResNet."""

    depth: Depth = Field(100, description="layers of the trunk")
    blocks: tuple[int, int, int, int] | None = Field(
        None, description="residual blocks of the four stages; by default those of `depth`"
    )
    width: int = Field(64, ge=1, description="channels of stage 1; the others have 2, 4 and 8 times as many")
    stem_stride: Literal[1, 2] = Field(1, description="stride of the first convolution, pixels")

    @field_validator("blocks")
    @classmethod
    def _check_blocks(cls, blocks: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if blocks is not None and min(blocks) < 1:
            raise ValueError(f"expected at least one block in each of the four stages, found {list(blocks)}")
        return blocks

    @property
    def narrowest_convolution(self) -> int:
        """Channels of the narrowest convolution."""
        return self.width

    def build_trunk(self, image_size: int) -> IResNet:
        """Return the IResNet for images of `image_size` pixels."""
        return IResNet(
            self.blocks or BLOCKS_OF_DEPTH[self.depth],
            image_size,
            width=self.width,
            stem_stride=self.stem_stride,
            embedding_size=self.embedding_size,
            dropout=self.dropout,
            recompute=self.recompute,
        )


class IResNetConfig(TrunkConfig):
    """InsightFace's residual network."""

    name: Literal["iresnet"] = Field(
        "iresnet", description="InsightFace's residual network, which is lgaf's trunk"
    )

    def build(self, image_size: int) -> Backbone:
        return self.build_trunk(image_size)


class IResNet(Backbone):
    """IResNet with four stages of `blocks` blocks and `width` x 1, 2, 4, 8 channels.

    channels, sides: the channels of the stages' output maps, and the height and width in cells.
    """

    branches = 0

    def __init__(
        self,
        blocks: Sequence[int],
        image_size: int,
        *,
        width: int = 64,
        stem_stride: int = 1,
        embedding_size: int = 512,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self._recompute = recompute
        self.image_size, self.embedding_size = image_size, embedding_size
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.channels = [width << stage for stage in range(STAGES)]
        self.sides = [-(-image_size // (stem_stride << stage)) for stage in range(1, STAGES + 1)]
        inputs = [width, *self.channels]
        self.layer1 = _stage(inputs[0], self.channels[0], blocks[0])
        self.layer2 = _stage(inputs[1], self.channels[1], blocks[1])
        self.layer3 = _stage(inputs[2], self.channels[2], blocks[2])
        self.layer4 = _stage(inputs[3], self.channels[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(self.channels[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self.channels[-1] * self.sides[-1] ** 2, embedding_size)
        self.features = feature_norm(embedding_size)
        initialise(self)

    def forward(self, images_BCHW: Tensor) -> Features:
        """Embed the images. Raises ValueError if they have another size than the network was built for."""
        emb_BD = self.embed(self.maps(images_BCHW)[-1])
        return Features(emb_BD, emb_BD.new_empty(emb_BD.shape[0], 0))

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the output maps of the stages."""
        check_size(images_BCHW, self.image_size)
        map_BCHW, maps = self.prelu(self.bn1(self.conv1(images_BCHW))), []
        for stage in self.stages:
            for block in stage:
                map_BCHW = run(block, map_BCHW, recompute=self._recompute)
            maps.append(map_BCHW)
        return maps

    @property
    def stages(self) -> list[nn.Sequential]:
        """All four stages, or fewer after `cut`."""
        return [getattr(self, name) for name in STAGE_NAMES if hasattr(self, name)]

    def cut(self, stages: int) -> None:
        """Remove the embedding's layers and all stages after the first `stages`; only maps remain."""
        for name in (*STAGE_NAMES[stages:], "bn2", "dropout", "fc", "features"):
            delattr(self, name)

    def embed(self, map_BCHW: Tensor) -> Tensor:
        """Return the embedding [B, D] of the last stage's map, in float32."""
        cells = self.dropout(self.bn2(map_BCHW).flatten(1))
        return project(cells, self.fc, self.features)


class IBasicBlock(nn.Module):
    """BN, conv, BN, PReLU, conv (with the stride), BN; the sum with the input or its projection."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return the block's output; a stride of 2 halves the height and width."""
        out = self.prelu(self.bn2(self.conv1(self.bn1(map_BCHW))))
        out = self.bn3(self.conv2(out))
        return out + (map_BCHW if self.downsample is None else self.downsample(map_BCHW))


def _stage(inputs: int, channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        *(IBasicBlock(inputs if i == 0 else channels, channels, 2 if i == 0 else 1) for i in range(blocks))
    )


def feature_norm(size: int) -> nn.BatchNorm1d:
    """Return the last BN of a branch: its weight is fixed at 1, and only its bias is trained."""
    norm = nn.BatchNorm1d(size)
    norm.weight.requires_grad = False
    return norm


def project(cells_BN: Tensor, fc: nn.Linear, norm: nn.BatchNorm1d) -> Tensor:
    """Apply a linear layer and BN in the parameters' precision, without autocast; return float32.

    The 8 significant bits of bfloat16 are too few for the norm of the feature.
    """
    with torch.autocast(cells_BN.device.type, enabled=False):
        return norm(fc(cells_BN.to(fc.weight.dtype))).float()


def initialise(model: nn.Module) -> None:
    """Initialise kernels: normal with standard deviation 0.1, biases 0; the rest keeps torch's values."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, _CONV_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
