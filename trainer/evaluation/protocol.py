"""The seam between what embeds pictures and what judges embeddings.

    protocol = ...                              # reads its lists, never a pixel
    emb_ND = embed(protocol.faces)              # one row per face, in this order
    for name, scores in protocol.score(emb_ND).items():
        print(name, scores.figures, scores.convention)

A protocol knows which pictures it needs and what their embeddings say; it knows nothing of networks, ranks or
files of results. Whatever it finds comes as `Scores`, so that tables, JSON and plots know one kind only.

Shapes: N faces, D dimensions, R points of a curve, B bins.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from trainer.evaluation.metrics.similarity import chunks


class Face(NamedTuple):
    """One picture of a protocol: its file, and where the five points of the face lie in it.

    `landmark_52` is float32, x and y in pixels: the eye on the picture's left, the other eye, the tip of the
    nose, the corners of the mouth in the order of the eyes. None means that the picture is cropped already.
    `encoded` is the picture itself where it lies inside another file; `path` is then only what to call it.
    """

    path: Path
    landmark_52: np.ndarray | None
    encoded: bytes | None = None


class Faces(Sequence[Face]):
    """Faces as arrays; each `Face` is made when it is asked for, so that a million take tens of megabytes.

    `name_N` are the files' paths below `folder`, as bytes (dtype S); `landmark_N52` is float32.
    """

    def __init__(self, folder: Path, name_N: np.ndarray, landmark_N52: np.ndarray | None = None) -> None:
        self._folder, self._name_N, self._landmark_N52 = folder, name_N, landmark_N52

    def __len__(self) -> int:
        return len(self._name_N)

    @overload
    def __getitem__(self, index: int) -> Face: ...
    @overload
    def __getitem__(self, index: slice) -> Faces: ...
    def __getitem__(self, index: int | slice) -> Face | Faces:
        landmark = None if self._landmark_N52 is None else self._landmark_N52[index]
        if isinstance(index, slice):
            return Faces(self._folder, self._name_N[index], landmark)
        return Face(self._folder / os.fsdecode(self._name_N[index]), landmark)


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many genuine and impostor pairs, int64 [B] each, have a similarity in each bin.

    `edge_B1` float64 [B + 1] rises; a bin holds its lower edge and not its upper, the last holds both.
    """

    edge_B1: np.ndarray
    genuine_B: np.ndarray
    impostor_B: np.ndarray


@dataclass(frozen=True, eq=False)
class Rejection:
    """Error against the share of genuine pairs that were turned away for their quality.

    `fnmr_R` is the false non-match rate, at the threshold that has a false match rate of `fmr` over all
    impostor pairs, of the genuine pairs left when the share `rejected_R` of least quality has been rejected.
    P. Grother and E. Tabassi, Performance of biometric quality measures, IEEE PAMI 29(4), 2007.
    """

    fmr: float
    rejected_R: np.ndarray
    fnmr_R: np.ndarray


@dataclass(frozen=True, eq=False)
class Scores:
    """What a protocol found, in one of its conventions.

    `figures` are what tables and JSON show, rates from 0 to 1: "tar_at_far_0.0001", "rank_1", "map".
    `convention` is one sentence: which of the published ways to count this is. `roc` is FAR and TAR,
    [R] each, rising; `cmc` has curves by name, the rate of probes found at rank 1, 2, ... .
    """

    figures: dict[str, float]
    convention: str
    roc: tuple[np.ndarray, np.ndarray] | None = None
    cmc: Mapping[str, np.ndarray] = field(default_factory=dict)
    histogram: Histogram | None = None
    rejection: Rejection | None = None


# Protocol -> task -> what was found.
Results = dict[str, dict[str, Scores]]


class Protocol(ABC):
    """Which faces, in the order of the data, and what their embeddings say."""

    faces: Sequence[Face]

    @abstractmethod
    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Scores by the name of the task ("1:1", "1:N") or of the convention.

        `emb_ND` is float32 [N, D], a row for each of `faces`: the sum of the embeddings of a face and of its
        mirror image, not normalised, since its length is the quality. It may be a memory map; it is gone
        through in chunks. Raises ValueError if a row has no direction, naming the picture.
        """


class ProtocolFileError(ValueError):
    """A file of a protocol that is missing, or holds what it should not."""


def check_embeddings(emb_ND: np.ndarray, faces: Sequence[Face]) -> None:
    """Raises ValueError if there is not one row per face, or one is only zeros or holds NaN or infinity."""
    if emb_ND.ndim != 2 or len(emb_ND) != len(faces):
        raise ValueError(
            f"expected {len(faces)} embeddings, one for each picture, found shape {emb_ND.shape}"
        )
    for part in chunks(len(emb_ND)):
        peak_N = np.abs(emb_ND[part]).max(axis=1, initial=0.0)
        bad_N = np.flatnonzero(~np.isfinite(peak_N) | (peak_N == 0))
        if len(bad_N):
            found = "only zeros" if peak_N[bad_N[0]] == 0 else "NaN or infinity"
            path = faces[part.start + int(bad_N[0])].path
            raise ValueError(
                f"{path}: expected an embedding with a direction, found {found}; "
                "check that the network's weights are finite"
            )
