"""InsightFace's vision transformer for faces: every patch is a token, and the embedding reads all tokens.

    images -> patches -> + positions -> masking -> blocks -> norm -> masked tokens restored -> feature

`feature` is a linear layer over all tokens of the face, BN, a linear layer, BN. In training, a fraction of
the tokens is masked: the blocks do not receive them, and a learned token replaces them before `feature`.

Names, shapes and initialisation of the parameters are InsightFace's (recognition/arcface_torch/backbones/
vit.py). If the patch does not divide the image size, the last pixels of a side are unused: with 112 and 9,
four on the right and at the bottom.

Shapes: as in `base`; N tokens of width E.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.backbones.base import Backbone, BackboneConfig, Features, check_size
from trainer.backbones.recompute import run

HEADS, MLP_RATIO = 8, 4
_STD = 0.02
_FEATURE_EPS = 2e-5


# Width and depth of arcface_torch's vit_t to vit_l (backbones/__init__.py); all have 8 heads.
_VIT_SHAPES = {"T": (256, 12), "S": (512, 12), "B": (512, 24), "L": (768, 24)}


class ViTConfig(BackboneConfig):
    """The vision transformer of arcface_torch."""

    name: Literal["vit"] = Field("vit", description="a vision transformer")
    size: Literal["T", "S", "B", "L"] = Field(
        "B", description="width and number of blocks: T 256 and 12, S 512 and 12, B 512 and 24, L 768 and 24"
    )
    patch: int = Field(9, ge=1, description="side of the image patch of one token, pixels")
    drop_path: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="probability that the last block's attention, or its MLP, is skipped for an image in "
        "training; it rises linearly from 0 for the first block",
    )
    mask_ratio: float = Field(
        0.1, ge=0, lt=1, description="fraction of the tokens that are masked in training"
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Width and number of blocks."""
        return _VIT_SHAPES[self.size]

    def build(self, image_size: int) -> Backbone:
        return ViT(
            self,
            image_size,
            embedding_size=self.embedding_size,
            dropout=self.dropout,
            recompute=self.recompute,
        )


class ViT(Backbone):
    """A vision transformer of the size `config.size`."""

    branches = 0
    undecayed = frozenset({"pos_embed", "mask_token"})

    def __init__(
        self,
        config: ViTConfig,
        image_size: int,
        *,
        embedding_size: int = 512,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.embedding_size = image_size, embedding_size
        self._mask_ratio, self._recompute = config.mask_ratio, recompute
        width, depth = config.shape
        tokens = (image_size // config.patch) ** 2
        if tokens == 0:
            raise ValueError(
                f"backbone.patch: expected at most data.image_size, {image_size} pixels, found {config.patch}"
            )
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch, config.patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.pos_drop = nn.Dropout(dropout)
        # Deeper blocks are skipped more often.
        chances = torch.linspace(0, config.drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, dropout, chance) for chance in chances)
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=_FEATURE_EPS),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=_FEATURE_EPS),
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        _initialise(self)

    def forward(self, images_BCHW: Tensor) -> Features:
        """Embed the images. Raises ValueError if they have another size than the network was built for."""
        check_size(images_BCHW, self.image_size)
        token_BNE = self.patch_embed["proj"](images_BCHW).flatten(2).transpose(1, 2)
        token_BNE = self.pos_drop(token_BNE + self.pos_embed)
        kept_BN = self._kept_tokens(token_BNE) if self.training and self._mask_ratio else None
        if kept_BN is not None:
            token_BNE = _at(token_BNE, kept_BN)
        for block in self.blocks:
            token_BNE = run(block, token_BNE, recompute=self._recompute)
        token_BNE = self.norm(token_BNE.float())
        if kept_BN is not None:
            everywhere_BNE = self.mask_token.float().expand(len(token_BNE), self.pos_embed.shape[1], -1)
            token_BNE = everywhere_BNE.scatter(1, kept_BN[:, :, None].expand_as(token_BNE), token_BNE)
        # In float32: the 8 significant bits of bfloat16 are too few for the embedding's norm.
        with torch.autocast(token_BNE.device.type, enabled=False):
            emb_BD = self.feature(token_BNE.flatten(1))
        return Features(emb_BD, emb_BD.new_empty(emb_BD.shape[0], 0))

    def _kept_tokens(self, token_BNE: Tensor) -> Tensor:
        """Return the positions of the tokens to keep: equally many for each image, drawn at random."""
        images, tokens = token_BNE.shape[:2]
        order_BN = torch.rand(images, tokens, device=token_BNE.device).argsort(1)
        return order_BN[:, : int(tokens * (1 - self._mask_ratio))]


def _at(token_BNE: Tensor, index_BM: Tensor) -> Tensor:
    return token_BNE.gather(1, index_BM[:, :, None].expand(-1, -1, token_BNE.shape[2]))


class Block(nn.Module):
    """Attention and MLP, each added to its input; each is skipped with probability `drop_path` per image."""

    def __init__(self, width: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self._drop_path = drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)

    def forward(self, token_BNE: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        token_BNE = token_BNE + self._kept(self.attn(self.norm1(token_BNE)))
        return token_BNE + self._kept(self.mlp(self.norm2(token_BNE)))

    def _kept(self, change_BNE: Tensor) -> Tensor:
        """Return the change, zero for some images and scaled up for the others."""
        return change_BNE * F.dropout(
            change_BNE.new_ones(change_BNE.shape[0], 1, 1), self._drop_path, self.training
        )


class Attention(nn.Module):
    """Self-attention with 8 heads; queries, keys and values without bias."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, token_BNE: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        # [B, N, (3, heads, E / heads)] -> 3 x [B, heads, N, E / heads]
        q, k, v = self.qkv(token_BNE).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended_BNE = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(attended_BNE))


class MLP(nn.Module):
    """Two linear layers with ReLU6 between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, token_BNE: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        return self.drop(self.fc2(self.drop(F.relu6(self.fc1(token_BNE)))))


def _initialise(model: ViT) -> None:
    """Initialise linear layers, positions and mask token: normal with standard deviation 0.02; biases 0."""
    nn.init.normal_(model.mask_token, std=_STD)
    nn.init.trunc_normal_(model.pos_embed, std=_STD)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
