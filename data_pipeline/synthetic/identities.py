"""Synthetic identities and their images: each image is a pure function of (seed, identity, number).

`faces_of` draws the faces, `nuisances_of` the nuisances of their images; `render_images` renders and
compresses the images; `pairs_of` selects the pairs of a verification set. Training identities are numbered
from 0, verification identities from `HELD_OUT`, so that the two never overlap.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_pipeline import philox
from data_pipeline.synthetic.face import OCCLUSIONS, Face, Nuisances, ranges
from data_pipeline.synthetic.render import render_face

HELD_OUT = 1 << 31
_FACE, _NUISANCE, _SCENE, _PAIR = range(16, 20)  # streams of the counter-based generator
_OCCLUDED = 0.35  # share of occluded images at difficulty 1
AT_ONCE = 32  # number of images that a process renders per message


class SynthConfig(BaseModel):
    """A synthetic set: its identities, its images and its difficulty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of all identities and images")
    identities: int = Field(
        240, ge=1, le=HELD_OUT, description="number of training identities, the classes of train.rec"
    )
    images_per_identity: int = Field(28, ge=1, lt=1 << 32, description="images of each training identity")
    held_out_identities: int = Field(60, ge=2, lt=HELD_OUT, description="other identities, of held_out.bin")
    pairs: int = Field(
        1500,
        ge=2,
        lt=1 << 31,
        description="pairs in held_out.bin; every second pair is genuine; no image is used twice",
    )
    difficulty: float = Field(
        1.0,
        ge=0,
        le=1.5,
        description="strength of pose, expression, light, occlusion, deformation, blur, low resolution and "
        "JPEG compression; 0 is a sharp frontal portrait",
    )
    jpeg_quality: int | None = Field(
        None, ge=1, le=95, description="JPEG quality of all images; by default it falls with the difficulty"
    )
    image_size: int = Field(112, ge=16, le=4096, description="width and height of the images, pixels")
    processes: int | None = Field(
        None, ge=1, description="number of rendering processes, by default one per core; changes no image"
    )

    @property
    def images(self) -> int:
        """The number of training images."""
        return self.identities * self.images_per_identity


class SynthImage(NamedTuple):
    """One JPEG image with its identity, its number and its nuisances."""

    identity: int
    number: int
    nuisances: Nuisances
    jpeg: bytes


class Pairs(NamedTuple):
    """P pairs of images: pair i is images 2i and 2i+1 of `identity_2P` and `number_2P`, both int64."""

    identity_2P: np.ndarray
    number_2P: np.ndarray
    issame_P: np.ndarray


def faces_of(seed: int, identity_N: np.ndarray) -> list[Face]:
    """Return the faces of identities: every property is uniform in its range."""
    low_F, high_F = np.array(list(ranges(Face).values())).T
    uniform_NF = _uniform(seed, identity_N, _FACE, len(low_F)).T
    return [Face(*row) for row in (low_F + uniform_NF * (high_F - low_F)).tolist()]


def nuisances_of(
    seed: int, identity_N: np.ndarray, number_N: np.ndarray, difficulty: float
) -> list[Nuisances]:
    """Return the nuisances of image `number` of `identity`.

    Each value is uniform in its range, which `difficulty` scales around the neutral value: 0 gives the
    neutral value, 1 the full range, above 1 a wider range.
    """
    position_N = identity_N.astype(np.uint64) << np.uint64(32) | number_N.astype(np.uint64)
    neutral_F, low_F, high_F = np.array(list(ranges(Nuisances).values())).T
    uniform_NF = _uniform(seed, position_N, _NUISANCE, len(neutral_F)).T
    value_NF = neutral_F + difficulty * (low_F + uniform_NF * (high_F - low_F) - neutral_F)
    scene_N, occlusion_N, *_ = philox.words(seed, position_N, _SCENE)
    occlusions = _occlusions(occlusion_N * 2.0**-32, _OCCLUDED * difficulty)
    rows = zip(value_NF.tolist(), occlusions, scene_N.tolist(), strict=True)
    return [
        Nuisances(*values, occlusion=occlusion, scene=scene)  # type: ignore[misc]
        for values, occlusion, scene in rows
    ]


def _uniform(seed: int, position_N: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Return independent numbers [count, N] in [0, 1) for every position."""
    blocks = [philox.uniform(seed, position_N, block << 32 | stream) for block in range(-(-count // 4))]
    return np.concatenate(blocks)[:count]


def _occlusions(uniform_N: np.ndarray, share: float) -> list[str]:
    """Return the occlusions: each one but "none", the first, has an equal part of `share`."""
    kinds = len(OCCLUSIONS) - 1
    bounds = share * np.arange(kinds, -1, -1) / kinds
    return [OCCLUSIONS[(u < bounds).sum()] for u in uniform_N]


def render_images(config: SynthConfig, identity_N: np.ndarray, number_N: np.ndarray) -> list[SynthImage]:
    """Render image `number` of `identity`, N times; identities and numbers are int64 [N]."""
    nuisances = nuisances_of(config.seed, identity_N, number_N, config.difficulty)
    if config.jpeg_quality is not None:
        nuisances = [one._replace(jpeg_quality=config.jpeg_quality) for one in nuisances]
    faces = faces_of(config.seed, identity_N)
    rows = zip(identity_N.tolist(), number_N.tolist(), faces, nuisances, strict=True)
    return [
        SynthImage(identity, number, n, _jpeg(face, n, config.image_size))
        for identity, number, face, n in rows
    ]


def _jpeg(face: Face, nuisances: Nuisances, size: int) -> bytes:
    encoded = io.BytesIO()
    render_face(face, nuisances, size).save(encoded, "JPEG", quality=round(nuisances.jpeg_quality))
    return encoded.getvalue()


def pairs_of(config: SynthConfig) -> Pairs:
    """Return the pairs to compare: 0, 2, 4... are genuine, the others impostors; no image is used twice."""
    pair_P = np.arange(config.pairs)
    word_4P = philox.words(config.seed, pair_P, _PAIR).astype(np.int64)
    issame_P = pair_P % 2 == 0
    first_P = word_4P[0] % config.held_out_identities
    step_P = 1 + word_4P[1] % (config.held_out_identities - 1)
    second_P = (first_P + np.where(issame_P, 0, step_P)) % config.held_out_identities
    identity_2P = HELD_OUT + np.stack([first_P, second_P], axis=1).ravel()
    return Pairs(identity_2P, np.arange(2 * config.pairs), issame_P)
