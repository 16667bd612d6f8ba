"""LGAF (arXiv 2411.16169): local and global features of a face, fused according to their quality.

    images -> trunk -+-> last stage --> GFE: BN, fc, BN ---------> global feature -+-> LGF -> embedding
                     +-> stage 2 -----> MHMS: heads, pool, fc, BN -> local feature -+

A feature's norm measures its quality. LGF standardises each branch's norm by running statistics, turns the
norms into attention weights, and adds the unit features with these weights. `docs/lgaf.md` lists the paper's
statements and this project's own choices. Branches are always in the order global, local.

Shapes: as in `base`; K = 2 branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.backbones.base import Backbone, Features
from trainer.backbones.iresnet import IResNet, TrunkConfig, feature_norm, initialise, project
from trainer.backbones.recompute import run

GLOBAL, LOCAL = 0, 1
_EPS = 1e-3


class MHMSConfig(BaseModel):
    """The local branch, multi-head multi-scale feature extraction."""

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
        description="divide LANet's attention by its mean over the map, so that the attention lost by some "
        "cells goes to the others",
    )
    grid: int = Field(
        7,
        ge=1,
        description="side of the grid to which a head's map is averaged, cells; limited to the map's side",
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
        description="probability that a head is dropped for an image in training; the others are scaled up",
    )

    @model_validator(mode="after")
    def _has_heads_to_compare(self) -> MHMSConfig:
        if self.divergence and len(self.heads) < 2:
            raise ValueError(
                f"divergence = {self.divergence:g}, which compares heads: expected at least two heads, found "
                "one; set divergence to 0, or add heads"
            )
        return self

    @field_validator("heads")
    @classmethod
    def _check_heads(cls, heads: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for number, kernels in enumerate(heads):
            if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
                raise ValueError(
                    f"head {number}: expected at least one kernel size, each odd and positive, so that the "
                    f"map keeps its size, found {list(kernels)}; an example: [[1, 3], [3, 5]]"
                )
        return heads


class LGFConfig(BaseModel):
    """The fusion of the branches by their feature norms."""

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
        False, description="let the loss also train the feature norms, through the attention weights"
    )
    branch_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the loss for the branches' own features, with the same class centres",
    )
    momentum: float = Field(
        0.01, gt=0, le=1, description="weight of the newest batch in the running statistics of the norms"
    )


class LGAFConfig(TrunkConfig):
    """LGAF: a trunk with a global and a local branch, fused by their feature norms."""

    name: Literal["lgaf"] = Field("lgaf", description="a global and a local branch on an iresnet trunk")
    local_only: bool = Field(
        False, description="omit the global branch; the local one is omitted by name = iresnet"
    )
    mhms: MHMSConfig = Field(MHMSConfig(), description="the local branch")
    lgf: LGFConfig = Field(LGFConfig(), description="the fusion of the branches")

    def build(self, image_size: int) -> Backbone:
        trunk = self.build_trunk(image_size)
        return LGAF(trunk, self.mhms, self.lgf, self.dropout, self.recompute, self.local_only)


class Fusion(NamedTuple):
    """LGF's output: embedding; for each branch unit feature, norm, standardised norm, attention weight."""

    emb_BD: Tensor
    unit_BKD: Tensor
    norm_BK: Tensor
    quality_BK: Tensor
    weight_BK: Tensor


class LGAF(Backbone):
    """An IResNet trunk with its own embedding as the global branch, MHMS as the local one, and LGF.

    With `local_only`, the global branch is omitted, and so are the trunk's layers after MHMS's input map.
    """

    def __init__(
        self,
        trunk: IResNet,
        mhms: MHMSConfig,
        lgf: LGFConfig,
        dropout: float = 0.0,
        recompute: bool = False,
        local_only: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_size, self.branches = trunk.embedding_size, 1 if local_only else 2
        self.trunk = trunk
        self._stage = mhms.stage - 1
        inputs, side = trunk.channels[self._stage], trunk.sides[self._stage]
        self.mhms = MHMS(inputs, side, trunk.embedding_size, mhms, dropout, recompute)
        self._divergence = mhms.divergence
        self.lgf = LGF(trunk.embedding_size, self.branches, lgf)
        # The feature of a single branch has the embedding's direction.
        self._branch_share = 0.0 if local_only else lgf.branch_share
        self._local_only = local_only
        if local_only:
            trunk.cut(mhms.stage)

    @property
    def loss_shares(self) -> tuple[float, ...]:
        """Weights in the loss; the branches divide `branch_share` evenly."""
        if self._branch_share == 0:
            return (1.0,)
        return 1 - self._branch_share, *[self._branch_share / self.branches] * self.branches

    def forward(self, images_BCHW: Tensor) -> Features:
        """Embed the images. Raises ValueError if they have another size than the network was built for."""
        fusion, attention_BHN = self._fuse(images_BCHW)
        branch_BKD = penalty = None
        if self.training and self._branch_share:
            branch_BKD = fusion.emb_BD.detach().norm(dim=1)[:, None, None] * fusion.unit_BKD
        if self.training and self._divergence:
            penalty = self._divergence * similarity(attention_BHN)
        return Features(fusion.emb_BD, fusion.norm_BK.detach(), branch_BKD, penalty)

    def fuse(self, images_BCHW: Tensor) -> Fusion:
        """Embed the images, and return also norms, qualities and attention weights of the branches."""
        return self._fuse(images_BCHW)[0]

    def _fuse(self, images_BCHW: Tensor) -> tuple[Fusion, Tensor]:
        maps = self.trunk.maps(images_BCHW)
        local_BD, attention_BHN = self.mhms(maps[self._stage])
        features = [local_BD] if self._local_only else [self.trunk.embed(maps[-1]), local_BD]
        return self.lgf(torch.stack(features, dim=1)), attention_BHN

    @property
    def global_branch(self) -> Backbone:
        """The trunk, whose own embedding is the global feature; with `local_only` the whole network."""
        return self if self._local_only else self.trunk

    def update_statistics(self, norm_GK: Tensor) -> None:
        """Update LGF's running statistics by the norms of one global batch."""
        self.lgf.update_statistics(norm_GK)


class LGF(nn.Module):
    """Local and global feature fusion: attention by feature norm, over K branches of D features."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, size: int, branches: int, config: LGFConfig) -> None:
        super().__init__()
        self._config = config
        # BN gives each entry of a feature variance 1, and so the feature this norm. The deviation starts
        # large, so that the attention weights start nearly equal.
        self.register_buffer("norm_mean", torch.full((branches,), math.sqrt(size)))
        self.register_buffer("norm_std", torch.full((branches,), math.sqrt(size)))

    def forward(self, feature_BKD: Tensor) -> Fusion:
        """Fuse the branches' features; the embedding's norm is the attention-weighted mean of their norms."""
        with torch.autocast(feature_BKD.device.type, enabled=False):
            norm_BK = (feature_BKD if self._config.learned else feature_BKD.detach()).norm(dim=2)
            quality_BK = ((norm_BK - self.norm_mean) / (self.norm_std + _EPS)).clamp(
                -self._config.clip, self._config.clip
            )
            weight_BK = F.softmax(self._config.attention_scale * quality_BK, dim=1)
            unit_BKD = F.normalize(feature_BKD, dim=2)
            fused_BD = (weight_BK[:, :, None] * unit_BKD).sum(1)
            length_B1 = (weight_BK * norm_BK).sum(1, keepdim=True).detach()
            emb_BD = length_B1 * F.normalize(fused_BD, dim=1)
            return Fusion(emb_BD, unit_BKD, norm_BK, quality_BK, weight_BK)

    @torch.no_grad()
    def update_statistics(self, norm_GK: Tensor) -> None:
        """Move the running statistics towards those of one global batch."""
        mean_K, std_K = batch_statistics(norm_GK)
        self.norm_mean.lerp_(mean_K, self._config.momentum)
        self.norm_std.lerp_(std_K, self._config.momentum)


def batch_statistics(norm_GK: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [K] of each branch's norms, float32.

    Sums are in float64, where those of float32 numbers are exact, so that the result does not depend on the
    order of the batch. That of torch.std_mean does.
    """
    norm_GK = norm_GK.double()
    mean_K = norm_GK.mean(0)
    return mean_K.float(), (norm_GK - mean_K).square().mean(0).sqrt().float()


def similarity(attention_BHN: Tensor) -> Tensor:
    """Return the mean cosine between two heads' spatial attention, from 0 to 1: a scalar in float32.

    Diverse attention in face networks: Wang et al., Hierarchical Pyramid Diverse Attention Networks, CVPR
    2020. Mean over pairs of heads: Li et al., Multi-Head Attention with Disagreement Regularization, arXiv
    1810.10183. Cosines are used because sigmoid attention has no fixed sum: a plain product could be lowered
    by less attention everywhere.
    """
    unit_BHN = F.normalize(attention_BHN.float(), dim=2)
    heads = unit_BHN.shape[1]
    with torch.autocast(unit_BHN.device.type, enabled=False):
        sum_B = unit_BHN.sum(1).square().sum(1)  # over all pairs, including each head with itself
    return ((sum_B - heads) / (heads * (heads - 1))).mean()


class MHMS(nn.Module):
    """Multi-head multi-scale local feature extraction.

    It maps [B, C, H, W] to the local feature [B, D] and each head's spatial attention [B, heads, H * W].
    """

    def __init__(
        self,
        inputs: int,
        side: int,
        size: int,
        config: MHMSConfig,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self._recompute = recompute
        channels, grid = max(1, inputs // config.head_reduction), min(config.grid, side)
        self.heads = nn.ModuleList(Head(inputs, channels, kernels, config, grid) for kernels in config.heads)
        self.head_drop = nn.Dropout1d(config.head_drop)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(len(config.heads) * channels * grid**2, size)
        self.features = feature_norm(size)
        initialise(self)

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local feature, in float32, and the heads' spatial attention."""
        cells, attentions = zip(
            *(run(head, map_BCHW, recompute=self._recompute) for head in self.heads), strict=True
        )
        cells_BHN = self.head_drop(torch.stack(cells, dim=1))
        local_BD = project(self.dropout(cells_BHN.flatten(1)), self.fc, self.features)
        return local_BD, torch.stack(attentions, dim=1)


class Head(nn.Module):
    """MSNet, LANet, SE, and average pooling to a grid."""

    def __init__(
        self, inputs: int, channels: int, kernels: Sequence[int], config: MHMSConfig, grid: int
    ) -> None:
        super().__init__()
        self.msnet = MSNet(inputs, channels, kernels)
        self.lanet = LANet(channels, config.attention_reduction, config.shared_attention)
        self.se = SE(channels, config.attention_reduction)
        self.pool = nn.AdaptiveAvgPool2d(grid)

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid's cells [B, channels * grid^2] and the spatial attention [B, H * W]."""
        map_BCHW = self.msnet(map_BCHW)
        attention_B1HW = self.lanet(map_BCHW)
        return self.pool(self.se(map_BCHW * attention_B1HW)).flatten(1), attention_B1HW.flatten(1)


class MSNet(nn.Module):
    """Parallel convolutions of several kernel sizes, fused by a 1x1 convolution."""

    def __init__(self, inputs: int, channels: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_conv_bn_prelu(inputs, channels, kernel) for kernel in kernels)
        self.fuse = _conv_bn_prelu(len(kernels) * channels, channels, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return a map of the same height and width."""
        return self.fuse(torch.cat([scale(map_BCHW) for scale in self.scales], dim=1))


def _conv_bn_prelu(inputs: int, channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.PReLU(channels))


class LANet(nn.Module):
    """Spatial attention: one factor in (0, 1) for every cell, computed from the cell's own channels.

    With `shared`, the factors are divided by their mean over the map, so that a partly occluded face yields a
    local feature as strong as that of a visible one.
    """

    def __init__(self, channels: int, reduction: int, shared: bool = False) -> None:
        super().__init__()
        self._shared = shared
        inner = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, 1, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return the attention [B, 1, H, W], by which the caller multiplies the map."""
        attention_B1HW = torch.sigmoid(self.excite(F.relu(self.squeeze(map_BCHW))))
        if self._shared:
            attention_B1HW = attention_B1HW / (attention_B1HW.mean((2, 3), keepdim=True) + _EPS)
        return attention_B1HW


class SE(nn.Module):
    """Channel attention: one factor in (0, 1) for every channel, computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, channels, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return the map multiplied by the attention."""
        mean_BC11 = F.adaptive_avg_pool2d(map_BCHW, 1)
        return map_BCHW * torch.sigmoid(self.excite(F.relu(self.squeeze(mean_BC11))))
