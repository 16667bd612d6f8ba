"""What the user says about the data: the keys under `[data]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_pipeline.shuffle import Blocks


class _Change(BaseModel):
    """One way to change an image. A pair is a range, from which a number is drawn for every sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: float = Field(0.0, ge=0, le=1, description="share of samples changed so; 0 is off")

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name, value in self:
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name}: expected [lowest, highest], found {list(value)}")
        return self


_Share = Annotated[float, Field(gt=0, le=1)]
_Aspect = Annotated[float, Field(ge=0.1, le=10)]
_AREA = "range of its area, as a share of the image's"
_ASPECT = "range of its width over its height"


class OcclusionConfig(_Change):
    """A rectangle of one random colour hides a part of the face."""

    area: tuple[_Share, _Share] = Field((0.02, 0.25), description=f"the rectangle that hides: {_AREA}")
    aspect: tuple[_Aspect, _Aspect] = Field((0.4, 2.5), description=f"the same rectangle: {_ASPECT}")


class CropConfig(_Change):
    """A rectangle of the face stays at its place, the rest turns black; the defaults are AdaFace's."""

    area: tuple[_Share, _Share] = Field((0.2, 1.0), description=f"the rectangle that stays: {_AREA}")
    aspect: tuple[_Aspect, _Aspect] = Field((0.75, 1.333), description=f"the same rectangle: {_ASPECT}")


_Length = Annotated[float, Field(ge=1, le=63)]
_Sigma = Annotated[float, Field(ge=0.1, le=20)]


class MotionBlurConfig(_Change):
    """The camera moves along a straight line, in any direction."""

    length: tuple[_Length, _Length] = Field((3.0, 11.0), description="range of the line's length, pixels")


class BlurConfig(_Change):
    """Gaussian blur."""

    sigma: tuple[_Sigma, _Sigma] = Field((0.4, 2.0), description="range of the standard deviation, pixels")


_Scale = Annotated[float, Field(ge=0.05, le=1)]


class LowResolutionConfig(_Change):
    """Scaled down and up again, each time by an interpolation drawn from five; the default is AdaFace's."""

    scale: tuple[_Scale, _Scale] = Field(
        (0.2, 1.0), description="range of the small image's width, as a share of the image's"
    )


class PhotometricConfig(_Change):
    """Factors of brightness, contrast and saturation, and a turn of the hue; the defaults are AdaFace's."""

    brightness: float = Field(0.5, ge=0, lt=1, description="half-width of the factor's range around 1")
    contrast: float = Field(
        0.5, ge=0, lt=1, description="half-width of the factor's range around 1; mid-grey stays as it is"
    )
    saturation: float = Field(0.5, ge=0, le=1, description="half-width of the factor's range around 1")
    hue: float = Field(0.0, ge=0, le=180, description="half-width of the range of the turn, degrees")


class GreyConfig(_Change):
    """All colour is lost."""


_Quality = Annotated[int, Field(ge=1, le=100)]


class JpegConfig(_Change):
    """Compressed once more, with lower quality."""

    quality: tuple[_Quality, _Quality] = Field((20, 90), description="range of JPEG's quality")


class AugmentConfig(BaseModel):
    """How a training sample is changed; every choice is a function of (seed, sample position).

    The changes are made in the order of the keys, the flip last: what hides the face, the lens, the sensor,
    its colours, the compression.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip_probability: float = Field(0.5, ge=0, le=1, description="share of samples mirrored left to right")
    occlusion: OcclusionConfig = OcclusionConfig()
    crop: CropConfig = CropConfig()
    motion_blur: MotionBlurConfig = MotionBlurConfig()
    blur: BlurConfig = BlurConfig()
    low_resolution: LowResolutionConfig = LowResolutionConfig()
    photometric: PhotometricConfig = PhotometricConfig()
    grey: GreyConfig = GreyConfig()
    jpeg: JpegConfig = JpegConfig()


def _listed(value: object) -> object:
    """One folder may be given without brackets."""
    return [value] if isinstance(value, str | Path) else value


class DataConfig(BaseModel):
    """The training set and how it is decoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[list[Path], BeforeValidator(_listed)] = Field(
        [],
        description="folder with .rec files as InsightFace and others publish them (train.rec, train.idx, "
        "property...), with .tar shards, or with one sub-folder of images per identity; or a list of such "
        "folders, where the classes of each follow those of the one before",
    )
    shards: list[str] = Field(
        [],
        description="instead of path: WebDataset shards that are streamed while training, as URLs "
        "(https://host/t-{000..999}.tar, s3://..., pipe:COMMAND); needs num_classes, and steps, not epochs",
    )
    shards_window: int = Field(
        2048, ge=1, description="samples of a streamed shard that are mixed with each other, held in memory"
    )
    catalog_dir: Path | None = Field(
        None,
        description="where to keep the catalogs that say where every image lies; by default in a hidden "
        "folder of the (first) dataset, or in ~/.cache/lgaf where that cannot be written",
    )
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
    shuffle_block: int = Field(
        1,
        ge=1,
        description="neighbouring records that the shuffle keeps together; some hundreds suit disks and file "
        "systems that are fast only in sequence, 1 is the full shuffle",
    )
    shuffle_window: int = Field(
        64, ge=1, description="blocks whose records are mixed, where shuffle_block is above 1"
    )
    max_bad_share: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of the samples of a rank whose records may be bad; such samples are replaced and "
        "listed in quarantine.jsonl, ten in any case",
    )
    hw_decoder_load: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of a batch decoded by the GPU's JPEG hardware, where it has any, the rest by its "
        "cores; between 0 and 1 an image's last bits may depend on its place in the batch",
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="augmentation of the training samples")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if bool(self.path) == bool(self.shards):
            found = "both" if self.path else "neither"
            raise ValueError(f"expected either path or shards, found {found}")
        if self.shards and self.num_classes is None:
            raise ValueError("shards: expected num_classes as well, which a stream cannot tell; set it")
        return self

    def shuffle_blocks(self) -> Blocks | None:
        """The block shuffle that is asked for; None for the full shuffle."""
        return None if self.shuffle_block == 1 else Blocks(self.shuffle_block, self.shuffle_window)
