"""IJB-B and IJB-C: templates of images and video frames, for verification and identification.

    IJBC/loose_crop/1.jpg, 2.jpg, ...                a face with a margin around it
    IJBC/meta/ijbc_name_5pts_score.txt               file, five points, the detector's confidence
              ijbc_face_tid_mid.txt                  file, template, medium; the same files in the same order
              ijbc_template_pair_label.txt           template, template, 1 for one person or 0
              ijbc_1N_gallery_G1.csv, ..._G2.csv     template, subject, ...; a header, a line for each face
              ijbc_1N_probe_mixed.csv                the same

IJB-B has the same files with the prefix `ijbb`, and galleries S1 and S2. This is the layout of InsightFace's
release, which recognition/arcface_torch/eval_ijbc.py and recognition/_evaluation_/ijb/ijb_1n.py in
https://github.com/deepinsight/insightface read. The protocols: B. Maze et al., IARPA Janus Benchmark - C:
face dataset and protocol, ICB 2018.

Shapes: N faces, D dimensions, T templates, P pairs or probes, G entries of a gallery.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.evaluation.metrics.identification import Search, cmc, mates
from trainer.evaluation.metrics.similarity import gallery_similarity, pair_similarity, unit_rows
from trainer.evaluation.metrics.templates import pooled
from trainer.evaluation.metrics.verification import histogram, rejection, roc, tar_at_far, threshold_at
from trainer.evaluation.protocol import EvaluationProtocol, Faces, ProtocolFileError, Scores, check_embeddings
from trainer.evaluation.protocols.lists import read_table

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)
REJECTION_FMR = 1e-3
_POOLING = (
    "frames of a medium averaged, media summed, faces weighted by embedding length and detector confidence, "
    "flip test by addition"
)
_GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}


class _Subjects(NamedTuple):
    """Templates, as rows of the pooled templates, and their subjects."""

    template_P: np.ndarray
    subject_P: np.ndarray


class IJB(EvaluationProtocol):
    """IJB-B or IJB-C in the folder that holds `loose_crop` and `meta`.

    Raises ProtocolFileError for lists that are missing, invalid or contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        meta = folder / "meta"
        prefix = _prefix(meta)
        face_N, media_N = _read_faces(meta, prefix)
        self.faces = Faces(folder / "loose_crop", face_N["name"], face_N["landmark"])
        self._confidence_N, self._medium_N = face_N["confidence"], media_N["medium"]
        self._id_T, self._template_N = np.unique(media_N["template"], return_inverse=True)
        self._read_pairs(meta / f"{prefix}_template_pair_label.txt")
        self._galleries = {
            name: self._read_subjects(meta / f"{prefix}_1N_gallery_{name}.csv") for name in _GALLERIES[prefix]
        }
        path = meta / f"{prefix}_1N_probe_mixed.csv"
        self._probes = self._read_subjects(path)
        for name, gallery in self._galleries.items():
            if not np.isin(self._probes.subject_P, gallery.subject_P).any():
                raise ProtocolFileError(
                    f"{path}: expected probes of subjects in gallery {name}, found none; "
                    "take both from one release"
                )

    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Return the scores "1:1" and "1:N"; see `EvaluationProtocol.score`."""
        check_embeddings(emb_ND, self.faces)
        template_TD = pooled(emb_ND, self._template_N, self._medium_N, self._confidence_N)
        quality_T = np.linalg.norm(template_TD, axis=1)
        unit_TD = unit_rows(template_TD)
        return {"1:1": self._verify(unit_TD, quality_T), "1:N": self._identify(unit_TD)}

    def _verify(self, unit_TD: np.ndarray, quality_T: np.ndarray) -> Scores:
        similarity_P = pair_similarity(unit_TD, self._left_P, self._right_P)
        genuine, impostor = similarity_P[self._issame_P], similarity_P[~self._issame_P]
        quality = np.minimum(
            quality_T[self._left_P[self._issame_P]], quality_T[self._right_P[self._issame_P]]
        )
        return Scores(
            figures=tar_at_far(genuine, impostor, FARS),
            convention=f"1:1 over the listed pairs of templates: {_POOLING}",
            roc=roc(genuine, impostor),
            histogram=histogram(genuine, impostor),
            rejection=rejection(genuine, quality, impostor, REJECTION_FMR),
        )

    def _identify(self, unit_TD: np.ndarray) -> Scores:
        found: dict[str, dict[str, float]] = {}
        curves = {}
        for name, gallery in self._galleries.items():
            search, mated_P = _search(unit_TD, self._probes, gallery)
            curve = curves[name] = cmc(search.first_rank(), max(len(gallery.template_P), *RANKS))
            found[name] = {f"rank_{rank}": float(curve[rank - 1]) for rank in RANKS}
            found[name] |= _tpir_at_fpir(search, mated_P)
        each = {f"{figure}_{name}": rate for name in found for figure, rate in found[name].items()}
        first, second = found.values()
        mean = {figure: (first[figure] + second[figure]) / 2 for figure in first if figure in second}
        return Scores(
            figures=mean | each,
            convention=(
                f"1:N with mixed probes, each gallery on its own and the mean of both: {_POOLING}; ranks "
                "over the probes that have a mate in the gallery, TPIR whatever the mate's rank"
            ),
            cmc=curves,
        )

    def _read_pairs(self, path: Path) -> None:
        pair_P = read_table(path, [("template", "i4"), ("other_template", "i4"), ("label", "i4")])
        self._left_P = self._rows(pair_P["template"], path)
        self._right_P = self._rows(pair_P["other_template"], path)
        odd_P = np.flatnonzero((pair_P["label"] != 0) & (pair_P["label"] != 1))
        if len(odd_P):
            raise ProtocolFileError(
                f"{path}, line {odd_P[0] + 1}: expected the label 0 or 1, found {pair_P['label'][odd_P[0]]}"
            )
        self._issame_P = pair_P["label"] == 1
        if self._issame_P.all() or not self._issame_P.any():
            raise ProtocolFileError(f"{path}: expected pairs of both labels, found only {pair_P['label'][0]}")

    def _read_subjects(self, path: Path) -> _Subjects:
        line_L = read_table(path, [("template", "i4"), ("subject", "i4")], delimiter=",", header=1)
        id_P, first_P = np.unique(line_L["template"], return_index=True)
        subject_P = line_L["subject"][first_P]
        other_L = np.flatnonzero(subject_P[np.searchsorted(id_P, line_L["template"])] != line_L["subject"])
        if len(other_L):
            template, subject = line_L[other_L[0]]
            raise ProtocolFileError(
                f"{path}, line {other_L[0] + 2}: expected one subject for template {template}, "
                f"found {subject} and another before; copy the file again"
            )
        return _Subjects(self._rows(id_P, path), subject_P)

    def _rows(self, id_P: np.ndarray, path: Path) -> np.ndarray:
        """Return the rows of templates among the pooled templates."""
        row_P = np.minimum(np.searchsorted(self._id_T, id_P), len(self._id_T) - 1).astype(np.int32)
        unknown_P = np.flatnonzero(self._id_T[row_P] != id_P)
        if len(unknown_P):
            raise ProtocolFileError(
                f"{path}: expected templates that have a face, found {id_P[unknown_P[0]]} "
                f"and {len(unknown_P) - 1} more without one in the list of faces; "
                "take both from one release"
            )
        return row_P


def _prefix(meta: Path) -> str:
    found = [prefix for prefix in _GALLERIES if (meta / f"{prefix}_face_tid_mid.txt").exists()]
    if len(found) != 1:
        raise ProtocolFileError(
            f"{meta}: expected ijbb_face_tid_mid.txt or ijbc_face_tid_mid.txt, found {len(found)} of them; "
            "name the folder that holds loose_crop and meta"
        )
    return found[0]


def _read_faces(meta: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the two lists of faces, which must have the same order."""
    path, other_path = meta / f"{prefix}_name_5pts_score.txt", meta / f"{prefix}_face_tid_mid.txt"
    face_N = read_table(path, [("name", "S32"), ("landmark", "f4", (5, 2)), ("confidence", "f4")])
    media_N = read_table(other_path, [("name", "S32"), ("template", "i4"), ("medium", "i4")])
    if len(face_N) != len(media_N):
        raise ProtocolFileError(
            f"{path}: expected the {len(media_N)} faces of {other_path}, found {len(face_N)}; "
            "take both from one release"
        )
    other_N = np.flatnonzero(face_N["name"] != media_N["name"])
    if len(other_N):
        ours, theirs = face_N["name"][other_N[0]].decode(), media_N["name"][other_N[0]].decode()
        raise ProtocolFileError(
            f"{path}, line {other_N[0] + 1}: expected {theirs} as in {other_path}, found {ours}; "
            "take both from one release"
        )
    return face_N, media_N


def _search(unit_TD: np.ndarray, probes: _Subjects, gallery: _Subjects) -> tuple[Search, np.ndarray]:
    """Return the search of all probes in one gallery, and the mask of probes with a mate there, bool [P]."""
    probe_M, gallery_M = mates(probes.subject_P, gallery.subject_P)
    similarity_M = pair_similarity(unit_TD, probes.template_P[probe_M], gallery.template_P[gallery_M])
    search = Search(len(probes.template_P), probe_M, similarity_M)
    for part, similarity_PC in gallery_similarity(unit_TD[probes.template_P], unit_TD, gallery.template_P):
        similarity_PC[probes.subject_P[:, None] == gallery.subject_P[part]] = -np.inf
        search.add(similarity_PC)
    return search, np.isin(probes.subject_P, gallery.subject_P)


def _tpir_at_fpir(search: Search, mated_P: np.ndarray) -> dict[str, float]:
    threshold = {fpir: threshold_at(search.best_P[~mated_P], fpir) for fpir in FPIRS}
    return {
        f"tpir_at_fpir_{fpir:g}": float((search.first_similarity() >= least).mean())
        for fpir, least in threshold.items()
        if least is not None
    }
