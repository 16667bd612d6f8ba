"""What the user says about the network: the keys under `[backbone]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Depth = Literal[18, 34, 50, 100, 200]

# Blocks of the four stages, as in InsightFace's iresnet18 to iresnet200.
BLOCKS_OF_DEPTH: dict[Depth, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class MHMSConfig(BaseModel):
    """The local branch, multi-head multi-scale feature extraction; used by name = "lgaf"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Literal[2, 3, 4] = Field(2, description="stage of the trunk whose output the heads read")
    heads: tuple[tuple[int, ...], ...] = Field(
        ((1, 3), (3, 5), (5, 7)),
        min_length=1,
        description="one list per head: the kernel sizes of its parallel convolutions, cells, odd",
    )
    head_reduction: int = Field(2, ge=1, description="the stage's channels divided by those of one head")
    attention_reduction: int = Field(
        16, ge=1, description="r: a head's channels divided by those inside its two attentions"
    )
    shared_attention: bool = Field(
        True,
        description="whether LANet's attention is divided by its mean over the map: what some cells lose the "
        "others get",
    )
    grid: int = Field(
        7,
        ge=1,
        description="side of the grid into which a head's map is averaged, cells; at most the map's",
    )
    divergence: float = Field(
        0.0,
        ge=0,
        description="weight in the loss of the mean cosine between two heads' spatial attention; 0: none",
    )
    head_drop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="chance that a head is left out of a training step for an image; the rest is scaled up",
    )

    @model_validator(mode="after")
    def _has_heads_to_compare(self) -> MHMSConfig:
        if self.divergence and len(self.heads) < 2:
            raise ValueError(
                f"divergence = {self.divergence:g} compares heads with each other: expected at least two, "
                "found one; set divergence to 0, or add heads"
            )
        return self

    @field_validator("heads")
    @classmethod
    def _check_heads(cls, heads: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for number, kernels in enumerate(heads):
            if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
                raise ValueError(
                    f"head {number} has kernel sizes {list(kernels)}, expected at least one, each odd and "
                    "positive, so that the map keeps its size; an example: [[1, 3], [3, 5]]"
                )
        return heads


class LGFConfig(BaseModel):
    """The fusion of the branches by their feature norms; used by name = "lgaf"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention_scale: float = Field(
        0.333,
        ge=0,
        description="logit of attention per standard deviation of feature norm; 0: equal weights",
    )
    clip: float = Field(
        3.0, gt=0, description="largest size of a standardised feature norm, standard deviations"
    )
    learned: bool = Field(
        False, description="whether the loss also teaches the feature norms, through the attention weights"
    )
    branch_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the loss that falls to what each branch alone says, by the same class centres",
    )
    momentum: float = Field(
        0.01, gt=0, le=1, description="share of the newest batch in the running statistics of the norms"
    )


# Width and depth of arcface_torch's vit_t to vit_l (backbones/__init__.py); all have 8 heads.
_VIT_SHAPES = {"T": (256, 12), "S": (512, 12), "B": (512, 24), "L": (768, 24)}


class ViTConfig(BaseModel):
    """The vision transformer; used by name = "vit"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Literal["T", "S", "B", "L"] = Field(
        "B", description="width and number of blocks: T 256 and 12, S 512 and 12, B 512 and 24, L 768 and 24"
    )
    patch: int = Field(9, ge=1, description="side of the patch of image that becomes a token, pixels")
    drop_path: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="chance that the last block's attention, or its MLP, is left out for an image in "
        "training; it rises linearly from 0 at the first",
    )
    mask_ratio: float = Field(
        0.1, ge=0, lt=1, description="share of the tokens that are hidden from the blocks in training"
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Width and number of blocks."""
        return _VIT_SHAPES[self.size]


class BackboneConfig(BaseModel):
    """The network that turns an image into an embedding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["lgaf", "iresnet", "vit"] = Field(
        "lgaf",
        description="network: lgaf; its trunk alone, iresnet; or vit, of which only `vit`, "
        "embedding_size, dropout, weights and recompute are read",
    )
    depth: Depth = Field(100, description="layers of the trunk")
    blocks: tuple[int, int, int, int] | None = Field(
        None, description="residual blocks of the four stages; by default those of `depth`"
    )
    width: int = Field(64, ge=1, description="channels of stage 1; the others have 2, 4 and 8 times as many")
    stem_stride: Literal[1, 2] = Field(1, description="stride of the first convolution, pixels")
    embedding_size: int = Field(512, ge=1, description="length of the embedding")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of zeroed inputs of the last linear layers; in vit of what enters and leaves the "
        "blocks' layers",
    )
    weights: Path | None = Field(
        None,
        description="file of the weights that a new run begins with: a state dict by InsightFace's names, "
        "for lgaf that of its global branch, or a file of `lgaf checkpoint extract`; by default random ones",
    )
    recompute: bool = Field(
        False,
        description="keep only what enters a block, and compute its insides again in the backward pass: much "
        "less memory, about a third more work, the same results",
    )
    vit: ViTConfig = Field(ViTConfig(), description="the vision transformer")
    local_only: bool = Field(
        False, description="leaves out lgaf's global branch; its local one is left out by name = iresnet"
    )
    mhms: MHMSConfig = Field(MHMSConfig(), description="the local branch of lgaf")
    lgf: LGFConfig = Field(LGFConfig(), description="the fusion of lgaf's branches")

    @field_validator("blocks")
    @classmethod
    def _check_blocks(cls, blocks: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if blocks is not None and min(blocks) < 1:
            raise ValueError(f"expected at least one block in each of the four stages, found {list(blocks)}")
        return blocks

    @property
    def stage_blocks(self) -> tuple[int, int, int, int]:
        """Residual blocks of the four stages."""
        return self.blocks or BLOCKS_OF_DEPTH[self.depth]
