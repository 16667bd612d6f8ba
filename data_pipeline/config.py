"""What the user says about the data: the keys under `[data]`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class AugmentConfig(BaseModel):
    """How a training sample is changed; every choice is a function of (seed, sample position)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip_probability: float = Field(0.5, ge=0, le=1, description="share of samples mirrored left to right")
    brightness: float = Field(
        0.0, ge=0, lt=1, description="half-width of the brightness factor's range around 1; 0 is off"
    )
    contrast: float = Field(
        0.0, ge=0, lt=1, description="half-width of the contrast factor's range around 1; 0 is off"
    )


class DataConfig(BaseModel):
    """The training set and how it is decoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="folder with train.rec, train.idx and, where it exists, property")
    num_classes: int | None = Field(
        None,
        ge=1,
        description="number of identities; by default what `property` says, else largest label + 1",
    )
    image_size: int = Field(112, ge=16, description="height and width of the network's input, pixels")
    threads: int | None = Field(
        None, ge=1, description="decode threads per rank; by default the node's cores divided by its ranks"
    )
    prefetch_batches: int = Field(2, ge=1, description="micro-batches decoded ahead of the network")
    augment: AugmentConfig = Field(AugmentConfig(), description="augmentation of the training samples")
