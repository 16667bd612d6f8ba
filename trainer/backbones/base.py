"""What the trainer sees of any network: images in, an embedding and the norms of its branches out.

A network knows nothing of ranks. Statistics over the whole batch are therefore not its business: it returns
the norms, the training step gathers them and hands all of them to `update_statistics`, the same on every
rank; `forward` only reads what was accumulated.

Shapes: B images of one rank, G of the global batch; C channels, H x W pixels or cells; D the embedding's
length; K branches.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class BackboneConfig(BaseModel):
    """The keys that all backbones have; a subclass names itself, adds its keys and builds its network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
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
        description="file of the weights with which a new run starts: a state dict by InsightFace's names, "
        "for lgaf that of its global branch, or a file of `lgaf checkpoint extract`; by default random ones",
    )
    recompute: bool = Field(
        False,
        description="keep only what enters a block, and compute its inside again in the backward pass: much "
        "less memory, about a third more work, the same results",
    )

    @property
    def narrowest_convolution(self) -> int | None:
        """Channels of the narrowest convolution; None if that is not limited by anything."""
        return None

    def build(self, image_size: int) -> Backbone:
        """Return the network for images of `image_size` pixels, initialised at random."""
        raise NotImplementedError


class Features(NamedTuple):
    """What a network says of B images, in float32.

    `emb_BD`: the embedding; its direction says who, its length how good the image is. `norm_BK`: the feature
    norm of each branch, detached; no columns (K = 0) where a network has no branches. `branch_BKD`: what each
    branch alone says, as long as the embedding; None where the branches have no share of the loss. `penalty`:
    what training adds to the loss, a mean over the images, scalar and attached; None where there is nothing.
    """

    emb_BD: Tensor
    norm_BK: Tensor
    branch_BKD: Tensor | None = None
    penalty: Tensor | None = None

    def judged(self) -> Tensor:
        """All that the loss looks at [B, 1 + K, D]: embedding, then branches; `loss_shares` weighs them."""
        emb_B1D = self.emb_BD[:, None]
        return emb_B1D if self.branch_BKD is None else torch.cat([emb_B1D, self.branch_BKD], dim=1)


class Backbone(nn.Module):
    """A network for square images of one size, in [-1, 1]."""

    embedding_size: int
    branches: int
    undecayed: frozenset[str] = frozenset()
    """Names of parameters without weight decay, besides those of one dimension, which have none anyway."""

    @property
    def loss_shares(self) -> tuple[float, ...]:
        """The parts of the loss, 1 in all, that fall to the embedding and to each branch."""
        return (1.0,)

    def forward(self, images_BCHW: Tensor) -> Features:
        """Embed the images. Raises ValueError if they are not of the size the network was built for."""
        raise NotImplementedError

    @property
    def global_branch(self) -> Backbone:
        """The part that alone is a network of the field: its published weights load there."""
        return self

    def update_statistics(self, norm_GK: Tensor) -> None:
        """Accumulate the norms of one global batch; nothing for a network without branches."""
        assert norm_GK.shape[1] == self.branches == 0


def check_size(images_BCHW: Tensor, image_size: int) -> None:
    """Raise ValueError unless the images are square and of `image_size` pixels."""
    height, width = images_BCHW.shape[-2:]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"the network was built for images of {image_size}x{image_size} pixels, found {height}x{width}; "
            "resize them, or set data.image_size and train anew"
        )


def parameter_groups(model: Backbone, weight_decay: float) -> list[dict]:
    """Two groups for torch.optim: matrices and kernels with decay; biases, norms' weights, PReLU and what the
    network excepts by name without.

    Frozen parameters are in neither.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name for name, p in trained.items() if p.ndim > 1} - model.undecayed
    return [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
