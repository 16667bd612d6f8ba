"""The interface between the trainer and any network: images in, embeddings and the branches' norms out.

A network is independent of ranks. Its statistics over the whole batch are updated from outside: `forward`
returns the norms, the training step gathers those of all ranks, and `update_statistics` receives all of them,
the same on every rank.

Shapes: B images of one rank, G of the global batch; C channels, H x W pixels or cells; D the embedding size;
K branches.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class BackboneConfig(BaseModel):
    """The keys of all backbones; a subclass defines its `name`, adds its keys and builds its network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    embedding_size: int = Field(512, ge=1, description="length of the embedding")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of values that dropout sets to zero: inputs of the last linear layers; in vit "
        "the tokens and the outputs of the blocks' layers",
    )
    weights: Path | None = Field(
        None,
        description="file of initial weights for a new run: a state dict with InsightFace's names (for lgaf "
        "that of its global branch), or a file of `lgaf checkpoint extract`; by default weights are random",
    )
    recompute: bool = Field(
        False,
        description="keep only the input of each block, and recompute its activations in the backward pass: "
        "much less memory, about a third more computation, the same results",
    )

    @property
    def narrowest_convolution(self) -> int | None:
        """Channels of the narrowest convolution; None for a network to which no limit applies."""
        return None

    def build(self, image_size: int) -> Backbone:
        """Return the network for images of `image_size` pixels, initialised at random."""
        raise NotImplementedError


class Features(NamedTuple):
    """A network's output for B images, in float32.

    emb_BD: the embeddings; the direction represents the identity, the norm the quality of the image.
    norm_BK: the feature norm of each branch, detached; no columns (K = 0) for a network without branches.
    branch_BKD: the unit feature of each branch, scaled to the embedding's norm; None if the branches have no
    share of the loss. penalty: a term of the training loss, the mean over the images, a scalar with its
    autograd graph; None if there is none.
    """

    emb_BD: Tensor
    norm_BK: Tensor
    branch_BKD: Tensor | None = None
    penalty: Tensor | None = None

    def loss_inputs(self) -> Tensor:
        """Return the inputs of the loss [B, 1 + K, D]: embedding, then branches; see `loss_shares`."""
        emb_B1D = self.emb_BD[:, None]
        return emb_B1D if self.branch_BKD is None else torch.cat([emb_B1D, self.branch_BKD], dim=1)


class Backbone(nn.Module):
    """A network for square images of one size, with values in [-1, 1]."""

    embedding_size: int
    branches: int
    undecayed: frozenset[str] = frozenset()
    """Names of parameters without weight decay, in addition to all parameters of one dimension."""

    @property
    def loss_shares(self) -> tuple[float, ...]:
        """Weights in the loss of the embedding and of each branch; their sum is 1."""
        return (1.0,)

    def forward(self, images_BCHW: Tensor) -> Features:
        """Embed the images. Raises ValueError if they have another size than the network was built for."""
        raise NotImplementedError

    @property
    def global_branch(self) -> Backbone:
        """The part of the network into which the published weights of an architecture can be loaded."""
        return self

    def update_statistics(self, norm_GK: Tensor) -> None:
        """Update running statistics by the norms of one global batch; a network without branches has none."""
        assert norm_GK.shape[1] == self.branches == 0


def check_size(images_BCHW: Tensor, image_size: int) -> None:
    """Raise ValueError unless the images are square and of `image_size` pixels."""
    height, width = images_BCHW.shape[-2:]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"expected images of {image_size}x{image_size} pixels, for which the network was built, found "
            f"{height}x{width}; resize them, or train another network with data.image_size set to their size"
        )


def parameter_groups(model: Backbone, weight_decay: float) -> list[dict]:
    """Return two groups for torch.optim: matrices and kernels with weight decay, all others without.

    The others are biases, weights of normalisation layers, PReLU and the model's `undecayed`. Frozen
    parameters are in neither group.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name for name, p in trained.items() if p.ndim > 1} - model.undecayed
    return [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
