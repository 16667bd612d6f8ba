"""The interface between the code that embeds images and the protocols that score embeddings.

    protocol = ...                              # reads its lists, but no pixels
    emb_ND = embed(protocol.faces)              # one row per face, in this order
    for name, scores in protocol.score(emb_ND).items():
        print(name, scores.figures, scores.convention)

A protocol lists its images and scores their embeddings; it does not depend on networks, ranks or output
files. All protocols return `Scores`, the only input of tables, JSON and plots.

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
    """One image of a protocol: its file and the five landmarks of the face.

    landmark_52: float32, x and y in pixels: the eye on the left of the image, the other eye, the tip of the
    nose, the corners of the mouth in the order of the eyes; None if the image is cropped already.
    encoded: the image's bytes if it is stored inside another file; `path` is then only a name for messages.
    """

    path: Path
    landmark_52: np.ndarray | None
    encoded: bytes | None = None


class Faces(Sequence[Face]):
    """Faces stored as arrays; each `Face` is created on access, so that a million need tens of megabytes.

    name_N: paths of the files relative to `folder`, as bytes (dtype S). landmark_N52: float32.
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
    """Numbers of genuine and impostor pairs, int64 [B] each, by their similarity.

    edge_B1: float64 [B + 1], ascending; a bin includes its lower edge, and only the last its upper edge.
    """

    edge_B1: np.ndarray
    genuine_B: np.ndarray
    impostor_B: np.ndarray


@dataclass(frozen=True, eq=False)
class Rejection:
    """Error versus reject curve: the error rate as a function of the share of rejected genuine pairs.

    fnmr_R: the false non-match rate of the genuine pairs that remain after the share rejected_R of lowest
    quality is rejected, at the threshold whose false match rate over all impostor pairs is `fmr`.
    P. Grother and E. Tabassi, Performance of biometric quality measures, IEEE PAMI 29(4), 2007.
    """

    fmr: float
    rejected_R: np.ndarray
    fnmr_R: np.ndarray


@dataclass(frozen=True, eq=False)
class Scores:
    """The results of a protocol's task, under one convention.

    figures: rates from 0 to 1 for tables and JSON, by name: "tar_at_far_0.0001", "rank_1", "map".
    convention: one sentence that names the published way of counting. roc: FAR and TAR, [R] each, ascending.
    cmc: curves by name, the rate of probes identified at rank 1, 2, ... .
    """

    figures: dict[str, float]
    convention: str
    roc: tuple[np.ndarray, np.ndarray] | None = None
    cmc: Mapping[str, np.ndarray] = field(default_factory=dict)
    histogram: Histogram | None = None
    rejection: Rejection | None = None


# Protocol -> task -> scores.
Results = dict[str, dict[str, Scores]]


class EvaluationProtocol(ABC):
    """An evaluation protocol: its faces, in the order of the data, and the scoring of their embeddings."""

    faces: Sequence[Face]

    @abstractmethod
    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Return scores by the name of the task ("1:1", "1:N") or of the convention.

        emb_ND: float32 [N, D], one row for each of `faces`: the sum of the embeddings of the face and of its
        mirror image, not normalised, because its norm is the quality. It can be a memory map, which is read
        in chunks. Raises ValueError, naming the image, if a row is zero or non-finite.
        """


class ProtocolFileError(ValueError):
    """A file of a protocol that is missing or has invalid content."""


def check_embeddings(emb_ND: np.ndarray, faces: Sequence[Face]) -> None:
    """Raise ValueError unless there is one row per face and each is finite and not zero."""
    if emb_ND.ndim != 2 or len(emb_ND) != len(faces):
        raise ValueError(f"expected {len(faces)} embeddings, one for each image, found shape {emb_ND.shape}")
    for part in chunks(len(emb_ND)):
        peak_N = np.abs(emb_ND[part]).max(axis=1, initial=0.0)
        bad_N = np.flatnonzero(~np.isfinite(peak_N) | (peak_N == 0))
        if len(bad_N):
            found = "only zeros" if peak_N[bad_N[0]] == 0 else "NaN or infinity"
            path = faces[part.start + int(bad_N[0])].path
            raise ValueError(
                f"{path}: expected a finite embedding other than zero, found {found}; "
                "check that the network's weights are finite"
            )
