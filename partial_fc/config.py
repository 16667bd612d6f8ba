"""What the user says about the classifier: the keys under `[head]`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class MarginConfig(BaseModel):
    """How much harder the target class is made than the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["arcface", "cosface"] = Field(
        "arcface", description="arcface: m is added to the target's angle; cosface: taken off its cosine"
    )
    m: float = Field(
        0.5,
        ge=0,
        le=2,
        description="size of the margin: radians for arcface; cosine for cosface, usually 0.35 to 0.4",
    )


class HeadConfig(BaseModel):
    """The margin softmax over all identities, sharded over the ranks, and how its rows are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: MarginConfig = Field(MarginConfig(), description="margin of the target class")
    # Sums of exponentials travel between ranks as float64 without a common maximum: 200 keeps them in range.
    scale: float = Field(64.0, gt=0, le=200, description="factor from cosine to logit")
    tile: int | None = Field(
        None,
        ge=1,
        description="classes per tile; by default what suits the CPU's cache or 1/64 of the GPU's memory",
    )
    backend: Literal["auto", "streaming", "dense"] = Field(
        "auto",
        description="streaming: over tiles of classes; dense: all logits, by autograd; auto: streaming",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the class rows' SGD")
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="weight decay of the class rows' SGD: this times a row is added to its gradient",
    )
