"""Synthetic people and their pictures: every one a pure function of (seed, identity, number).

`faces_of` draws persons, `nuisances_of` the circumstances of their pictures, `pictures` paints and compresses
them, `pairs_of` says which pictures a verification set compares. Identities are numbered; those of training
count from 0, those of verification from `HELD_OUT`, so that no size of the one ever reaches into the other.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_pipeline import philox
from data_pipeline.synthetic.face import OCCLUSIONS, Face, Nuisances, ranges
from data_pipeline.synthetic.render import paint

HELD_OUT = 1 << 31
_FACE, _NUISANCE, _SCENE, _PAIR = range(16, 20)  # streams of the counter-based generator
_OCCLUDED = 0.35  # share of the pictures at difficulty 1
AT_ONCE = 32  # pictures a process paints between two messages


class SynthConfig(BaseModel):
    """A synthetic set: how many people, how many pictures, how hard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, lt=1 << 63, description="what all people and pictures are drawn from")
    identities: int = Field(
        240, ge=1, le=HELD_OUT, description="people to train on; the classes of train.rec"
    )
    images_per_identity: int = Field(28, ge=1, lt=1 << 32, description="pictures of each of them")
    held_out_identities: int = Field(60, ge=2, lt=HELD_OUT, description="other people, of held_out.bin")
    pairs: int = Field(
        1500,
        ge=2,
        lt=1 << 31,
        description="pairs in held_out.bin, every second of one person; all pictures differ",
    )
    difficulty: float = Field(
        1.0,
        ge=0,
        le=1.5,
        description="strength of pose, expression, light, occlusion, deformation, blur, low resolution and "
        "JPEG compression; 0 is a sharp frontal portrait",
    )
    jpeg_quality: int | None = Field(
        None, ge=1, le=95, description="JPEG quality of all pictures; by default it falls with the difficulty"
    )
    image_size: int = Field(112, ge=16, le=4096, description="width and height of the pictures, pixels")
    processes: int | None = Field(
        None, ge=1, description="painters that work at once; by default one per core; changes no picture"
    )

    @property
    def images(self) -> int:
        """The number of training pictures."""
        return self.identities * self.images_per_identity


class Picture(NamedTuple):
    """One JPEG, whose face it shows, and under which circumstances."""

    identity: int
    number: int
    nuisances: Nuisances
    jpeg: bytes


class Pairs(NamedTuple):
    """P pairs of pictures: pair i is pictures 2i and 2i+1 of `identity_2P` and `number_2P`, both int64."""

    identity_2P: np.ndarray
    number_2P: np.ndarray
    issame_P: np.ndarray


def faces_of(seed: int, identity_N: np.ndarray) -> list[Face]:
    """The faces of identities: every property is uniform between its ends."""
    low_F, high_F = np.array(list(ranges(Face).values())).T
    uniform_NF = _uniform(seed, identity_N, _FACE, len(low_F)).T
    return [Face(*row) for row in (low_F + uniform_NF * (high_F - low_F)).tolist()]


def nuisances_of(
    seed: int, identity_N: np.ndarray, number_N: np.ndarray, difficulty: float
) -> list[Nuisances]:
    """The circumstances of picture `number` of `identity`.

    Numbers are uniform between their ends, which `difficulty` moves towards the neutral value (0) or beyond
    themselves (above 1).
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
    """Independent numbers [count, N] in [0, 1) for every position."""
    blocks = [philox.uniform(seed, position_N, block << 32 | stream) for block in range(-(-count // 4))]
    return np.concatenate(blocks)[:count]


def _occlusions(uniform_N: np.ndarray, share: float) -> list[str]:
    """The first of the occlusions is none; the others divide `share` evenly."""
    kinds = len(OCCLUSIONS) - 1
    bounds = share * np.arange(kinds, -1, -1) / kinds
    return [OCCLUSIONS[(u < bounds).sum()] for u in uniform_N]


def pictures(config: SynthConfig, identity_N: np.ndarray, number_N: np.ndarray) -> list[Picture]:
    """Paint picture `number` of `identity`, N times; identities and numbers are int64 [N]."""
    nuisances = nuisances_of(config.seed, identity_N, number_N, config.difficulty)
    if config.jpeg_quality is not None:
        nuisances = [one._replace(jpeg_quality=config.jpeg_quality) for one in nuisances]
    faces = faces_of(config.seed, identity_N)
    rows = zip(identity_N.tolist(), number_N.tolist(), faces, nuisances, strict=True)
    return [
        Picture(identity, number, n, _jpeg(face, n, config.image_size)) for identity, number, face, n in rows
    ]


def _jpeg(face: Face, nuisances: Nuisances, size: int) -> bytes:
    encoded = io.BytesIO()
    paint(face, nuisances, size).save(encoded, "JPEG", quality=round(nuisances.jpeg_quality))
    return encoded.getvalue()


def pairs_of(config: SynthConfig) -> Pairs:
    """Which pictures are compared: pairs 0, 2, 4... show one person, the others two; all pictures differ."""
    pair_P = np.arange(config.pairs)
    word_4P = philox.words(config.seed, pair_P, _PAIR).astype(np.int64)
    issame_P = pair_P % 2 == 0
    first_P = word_4P[0] % config.held_out_identities
    step_P = 1 + word_4P[1] % (config.held_out_identities - 1)
    second_P = (first_P + np.where(issame_P, 0, step_P)) % config.held_out_identities
    identity_2P = HELD_OUT + np.stack([first_P, second_P], axis=1).ravel()
    return Pairs(identity_2P, np.arange(2 * config.pairs), issame_P)
