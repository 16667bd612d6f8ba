"""The keys under `[data]`: the training set, its decoding and its augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, model_validator

from data_pipeline.common.image_header import SIDES_PX
from data_pipeline.common.redaction import redacted
from data_pipeline.shuffle import Blocks


class _Change(BaseModel):
    """One kind of augmentation. A pair is a range, from which a value is drawn for every sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: float = Field(0.0, ge=0, le=1, description="share of samples that are changed; 0 is off")

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name, value in self:
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name}: expected [lowest, highest], found {list(value)}")
        return self


_Share = Annotated[float, Field(gt=0, le=1)]
_Aspect = Annotated[float, Field(ge=0.1, le=10)]
_AREA = "range of the area, as a share of the image's area"
_ASPECT = "range of width divided by height"


class OcclusionConfig(_Change):
    """A rectangle of one random colour that hides a part of the face."""

    area: tuple[_Share, _Share] = Field((0.02, 0.25), description=f"hidden rectangle: {_AREA}")
    aspect: tuple[_Aspect, _Aspect] = Field((0.4, 2.5), description=f"hidden rectangle: {_ASPECT}")


class CropConfig(_Change):
    """A crop that stays in place, with black pixels around it; the defaults are AdaFace's."""

    area: tuple[_Share, _Share] = Field((0.2, 1.0), description=f"kept rectangle: {_AREA}")
    aspect: tuple[_Aspect, _Aspect] = Field((0.75, 1.333), description=f"kept rectangle: {_ASPECT}")


_Length = Annotated[float, Field(ge=1, le=63)]
_Sigma = Annotated[float, Field(ge=0.1, le=20)]


class MotionBlurConfig(_Change):
    """Motion blur along a straight line, in a random direction."""

    length: tuple[_Length, _Length] = Field((3.0, 11.0), description="range of the motion's length, pixels")


class BlurConfig(_Change):
    """Gaussian blur."""

    sigma: tuple[_Sigma, _Sigma] = Field((0.4, 2.0), description="range of the standard deviation, pixels")


_Scale = Annotated[float, Field(ge=0.05, le=1)]


class LowResolutionConfig(_Change):
    """Scaling down and up again, each by one of five interpolations; the default range is AdaFace's."""

    scale: tuple[_Scale, _Scale] = Field(
        (0.2, 1.0), description="range of the reduced width, as a share of the image's width"
    )


class PhotometricConfig(_Change):
    """Factors of brightness, contrast and saturation, and a hue rotation; the defaults are AdaFace's."""

    brightness: float = Field(0.5, ge=0, lt=1, description="half-width of the factor's range around 1")
    contrast: float = Field(
        0.5, ge=0, lt=1, description="half-width of the factor's range around 1; mid-grey is unchanged"
    )
    saturation: float = Field(0.5, ge=0, le=1, description="half-width of the factor's range around 1")
    hue: float = Field(0.0, ge=0, le=180, description="half-width of the hue rotation's range, degrees")


class GreyConfig(_Change):
    """Conversion to grey."""


_Quality = Annotated[int, Field(ge=1, le=100)]


class JpegConfig(_Change):
    """JPEG compression with lower quality."""

    quality: tuple[_Quality, _Quality] = Field((20, 90), description="range of the JPEG quality")


class AugmentConfig(BaseModel):
    """Augmentation of the training samples; every choice is a function of (seed, sample position).

    The augmentations are applied in the order of the keys, except that the flip is the last. The order is
    that of a camera: occlusion and crop, lens, sensor, colours, compression.
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
    """Return a list: a single folder may be given without brackets."""
    return [value] if isinstance(value, str | Path) else value


class DataConfig(BaseModel):
    """The training set, its decoding and its augmentation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[list[Path], BeforeValidator(_listed)] = Field(
        [],
        description="folder with .rec files as InsightFace and others publish them (train.rec, train.idx, "
        "property...), with .tar shards, or with one sub-folder of images per identity; or a list of such "
        "folders, in which the classes of each folder follow those of the previous one",
    )
    shards: list[str] = Field(
        [],
        description="instead of path: URLs of WebDataset shards that are streamed during training "
        "(https://host/t-{000..999}.tar, s3://..., pipe:COMMAND); requires num_classes, and steps instead of "
        "epochs",
    )
    shards_window: int = Field(
        2048, ge=1, description="size of a streamed shard's shuffle buffer, in samples, held in memory"
    )
    max_sample_mb: int = Field(
        64,
        ge=1,
        description="largest size of a streamed sample, all of its files together, MiB; a larger one ends "
        "the run, because up to three times shards_window samples are held in memory",
    )
    catalog_dir: Path | None = Field(
        None,
        description="folder for the catalogs, which list the position of every image; by default a hidden "
        "folder of the (first) dataset, or ~/.cache/lgaf if the dataset's folder is read-only",
    )
    num_classes: int | None = Field(
        None,
        ge=1,
        description="number of identities; by default the number in `property`, else largest label + 1",
    )
    image_size: int = Field(112, ge=16, description="height and width of the network's input, pixels")
    threads: int | None = Field(
        None, ge=1, description="decode threads per rank; by default the node's cores divided by its ranks"
    )
    prefetch_batches: int = Field(2, ge=1, description="micro-batches decoded ahead of the network")
    shuffle_block: int = Field(
        1,
        ge=1,
        description="number of neighbouring records that the shuffle keeps together as a block; 1 is the "
        "full shuffle; some hundreds suit disks and file systems that are fast only for sequential reads",
    )
    shuffle_window: int = Field(
        64, ge=1, description="number of blocks whose records are mixed, if shuffle_block exceeds 1"
    )
    max_bad_share: float = Field(
        0.001,
        ge=0,
        le=1,
        description="tolerated share of a rank's samples with bad records; ten are always tolerated; bad "
        "records are replaced and listed in quarantine.jsonl",
    )
    max_image_side: int = Field(
        SIDES_PX[1],
        ge=SIDES_PX[0],
        description="largest accepted width and height of an image, pixels; the header of a larger one is "
        "read, and it counts as a bad record",
    )
    hw_decoder_load: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of a batch that the GPU's JPEG hardware decodes, if the GPU has any; its cores "
        "decode the rest; between 0 and 1 an image's last bits may depend on its place in the batch",
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="augmentation of the training samples")

    @field_serializer("shards", when_used="json")
    def _without_credentials(self, shards: list[str]) -> list[str]:
        # Checkpoints and reports are often readable by others; a resumed run has its own configuration.
        return [*map(redacted, shards)]

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if bool(self.path) == bool(self.shards):
            found = "both" if self.path else "neither"
            raise ValueError(f"expected either path or shards, found {found}")
        if self.shards and self.num_classes is None:
            raise ValueError(
                "shards: expected num_classes as well, found none; set it, because the number of classes "
                "cannot be read from a stream"
            )
        return self

    def shuffle_blocks(self) -> Blocks | None:
        """Return the configured block shuffle; None for the full shuffle."""
        return None if self.shuffle_block == 1 else Blocks(self.shuffle_block, self.shuffle_window)
