"""TinyFace: faces of 20 pixels, searched among images of the same identities and 153,428 distractors.

    Testing_Set/Probe/12_3.jpg                3,728 images; the name begins with the number of the identity
                Gallery_Match/12_1.jpg        4,443 images of the same identities
                Gallery_Distractor/*.jpg      images of identities without a probe

The identities are read from the file names, which agree with the `.mat` lists, as CVLface does
(run_v1/evaluations/tinyface in https://github.com/mk-minchul/CVLface ). Aligned copies in the same three
folders, as used by AdaFace, work as well. The protocol: Z. Cheng, X. Zhu and S. Gong, Low-resolution face
recognition, ACCV 2018; https://qmul-tinyface.github.io .

Shapes: N faces, D dimensions, P probes, G entries of the gallery.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.evaluation.metrics.identification import Search, cmc, mates
from trainer.evaluation.metrics.similarity import gallery_similarity, pair_similarity, unit_rows
from trainer.evaluation.protocol import EvaluationProtocol, Faces, ProtocolFileError, Scores, check_embeddings
from trainer.evaluation.protocols.lists import encoded, listing

RANKS = (1, 5, 20)
_CURVE = 100
_DISTRACTOR = -100


class TinyFace(EvaluationProtocol):
    """TinyFace in its `Testing_Set`.

    Raises ProtocolFileError if a folder is missing or empty, a name has no number, or a probe has no mate.
    """

    def __init__(self, folder: Path) -> None:
        probes, mated = listing(folder / "Probe"), listing(folder / "Gallery_Match")
        distractors = listing(folder / "Gallery_Distractor")
        self._label_P = _persons(folder / "Probe", probes)
        label_G = _persons(folder / "Gallery_Match", mated)
        alone_P = np.flatnonzero(~np.isin(self._label_P, label_G))
        if len(alone_P):
            raise ProtocolFileError(
                f"{folder / 'Probe' / probes[alone_P[0]]}: expected another image of this identity in "
                f"{folder / 'Gallery_Match'}, found none; unpack the complete test set"
            )
        self._label_G = np.append(label_G, np.full(len(distractors), _DISTRACTOR))
        self.faces = Faces(
            folder,
            encoded(
                [f"Probe/{name}" for name in probes]
                + [f"Gallery_Match/{name}" for name in mated]
                + [f"Gallery_Distractor/{name}" for name in distractors]
            ),
        )

    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Return the scores "identification"; see `EvaluationProtocol.score`."""
        check_embeddings(emb_ND, self.faces)
        search = self._search(emb_ND)
        curve = cmc(search.first_rank(), _CURVE)
        figures = {f"rank_{rank}": float(curve[rank - 1]) for rank in RANKS}
        return {
            "identification": Scores(
                figures=figures | {"map": float(search.average_precision().mean())},
                convention=(
                    "1:N closed set over all matched images and distractors, not fine-tuned on TinyFace; "
                    "rank of the first mate, mean average precision by the trapezoidal rule"
                ),
                cmc={"all probes": curve},
            )
        }

    def _search(self, emb_ND: np.ndarray) -> Search:
        probes, matched = len(self._label_P), int((self._label_G != _DISTRACTOR).sum())
        unit_ND = unit_rows(emb_ND[: probes + matched])
        probe_M, gallery_M = mates(self._label_P, self._label_G)
        search = Search(probes, probe_M, pair_similarity(unit_ND, probe_M, probes + gallery_M))
        row_G = np.arange(probes, len(emb_ND))
        for part, similarity_PC in gallery_similarity(unit_ND[:probes], emb_ND, row_G):
            similarity_PC[self._label_P[:, None] == self._label_G[part]] = -np.inf
            search.add(similarity_PC)
        return search


def _persons(folder: Path, names: list[str]) -> np.ndarray:
    person_N = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        person = name.split("_")[0]
        if not (person.isascii() and person.isdigit() and "_" in name):
            raise ProtocolFileError(
                f"{folder / name}: expected a name such as 12_3.jpg that begins with the number of the "
                "identity; use the names of the official download"
            )
        person_N[i] = int(person)
    return person_N
