"""Verification files (`lfw.bin`, ...) as a protocol: pairs of images, verified in ten folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np

from data_pipeline.formats.pair_file import PairSet, read_pairs
from trainer.evaluation.metrics.verification import VerificationResult, histogram, rejection, verify
from trainer.evaluation.protocol import EvaluationProtocol, Face, Scores, check_embeddings

TASK = "verification"
_CONVENTION = (
    "cosine of embeddings, flip test by addition; ten folds in the order of the file, each with the "
    "threshold that is best on the other nine"
)
_FMR = 1e-3


class _FacesInside(Sequence[Face]):
    """The images of a verification file, named by their numbers."""

    def __init__(self, path: Path, images: list[bytes]) -> None:
        self._path, self._images = path, images

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Face: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Face]: ...
    def __getitem__(self, index: int | slice) -> Face | Sequence[Face]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Face(self._path / f"image {index}", None, self._images[index])


class PairVerification(EvaluationProtocol):
    """The pairs of one verification file. Raises VerificationFileError for any other file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pairs: PairSet = read_pairs(path)
        self.faces = _FacesInside(path, self.pairs.images)

    def judge(self, emb_ND: np.ndarray) -> VerificationResult:
        """Verify every pair. Raises ValueError if there are too few pairs for ten folds, or as in `score`."""
        check_embeddings(emb_ND, self.faces)
        return verify(emb_ND, self.pairs.issame_P)

    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Return the scores "verification"; see `EvaluationProtocol.score`."""
        result = self.judge(emb_ND)
        norm_P2 = np.linalg.norm(emb_ND, axis=1).reshape(-1, 2)
        quality_G = norm_P2.min(axis=1)[result.issame_P]
        return {
            TASK: replace(
                scores_of(result), rejection=rejection(result.genuine, quality_G, result.impostor, _FMR)
            )
        }


def scores_of(result: VerificationResult) -> Scores:
    """Convert a verification result to `Scores`."""
    return Scores(
        result.summary(),
        _CONVENTION,
        roc=(result.far_R, result.tar_R),
        histogram=histogram(result.genuine, result.impostor),
    )
