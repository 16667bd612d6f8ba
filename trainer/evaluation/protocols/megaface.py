"""MegaFace, challenge 1: identification of an image among one mate and up to a million distractors.

    facescrub_images/Michael_Landes/Michael_Landes_43667.png     the probes, cropped and aligned
    megaface_images/534/53415754@N00/37731000_1.jpg              the distractors, likewise
    devkit/templatelists/facescrub_features_list.json            {"path": [...], "id": [...]}, 3,530 probes
                         megaface_features_list.json_1000000_1   {"path": [...]}; also of 10, 100, ... 100000
    facescrub_noises.txt, megaface_noises.txt                    optional: wrongly labelled images

This is the layout of InsightFace's test pack, recognition/_evaluation_/megaface in
https://github.com/deepinsight/insightface , next to the official devkit. I. Kemelmacher-Shlizerman et al.,
The MegaFace benchmark: 1 million faces for recognition at scale, CVPR 2016.

Shapes: N faces, D dimensions, P probes, M ordered pairs of two probes of one person, C distractors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.common import bounded_json
from data_pipeline.common.data_file import read_data_file
from trainer.evaluation.metrics.identification import Search, cmc, mates
from trainer.evaluation.metrics.similarity import gallery_similarity, pair_similarity, unit_rows
from trainer.evaluation.metrics.verification import roc, tar_at_far
from trainer.evaluation.protocol import EvaluationProtocol, Faces, ProtocolFileError, Scores, check_embeddings
from trainer.evaluation.protocols.lists import encoded, missing

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
FAR = 1e-6
# The end of the ROC: of billions of impostor pairs only the most similar ones are kept.
_LARGEST_FAR = 1e-4
_CURVE = 100
# The official list of a million distractors has 50 MB.
_MOST_BYTES = 1 << 28


class MegaFace(EvaluationProtocol):
    """MegaFace in the folder that holds `facescrub_images`, `megaface_images` and `devkit`.

    It uses all available lists of distractors, one to six. Raises ProtocolFileError for lists that are
    missing or invalid, and if no identity has two images.
    """

    def __init__(self, folder: Path) -> None:
        lists = folder / "devkit" / "templatelists"
        noises = folder / "facescrub_noises.txt", folder / "megaface_noises.txt"
        self._left_out = [path.name for path in noises if path.exists()]
        probes, persons = _read_probes(lists / "facescrub_features_list.json", _read_noises(noises[0]))
        sets = _read_distractors(lists, _read_noises(noises[1]))
        name_U, row = np.unique(np.concatenate(list(sets.values())), return_inverse=True)
        ends = np.cumsum([len(names) for names in sets.values()])[:-1]
        # Rows of `faces`; the first rows are the probes.
        self._sets = dict(zip(sets, np.split(len(probes) + row, ends), strict=True))
        self._label_P = np.unique(persons, return_inverse=True)[1]
        self.faces = Faces(
            folder, np.append(encoded([f"facescrub_images/{path}" for path in probes]), name_U)
        )

    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Return the scores "identification"; see `EvaluationProtocol.score`."""
        check_embeddings(emb_ND, self.faces)
        figures, curves = {}, {}
        for size, row_C in self._sets.items():
            search, largest = self._search(emb_ND, row_C)
            curves[f"{size} distractors"] = cmc(1 + search.before_M, _CURVE)
            figures[f"rank_1_at_{size}"] = float(curves[f"{size} distractors"][0])
        impostors = len(self._label_P) * len(row_C)
        figures |= tar_at_far(search.similarity_M, largest, [FAR], impostors=impostors)
        noise = f"without the images in {' and '.join(self._left_out)}" if self._left_out else "with noise"
        return {
            "identification": Scores(
                figures=figures,
                convention=(
                    "1:N closed set, every ordered pair of two probes of one person among the distractors, "
                    f"{noise}; TAR over the same pairs, FAR over all probes and all distractors of the "
                    "largest list"
                ),
                roc=_roc(search.similarity_M, largest, impostors),
                cmc=curves,
            )
        }

    def _search(self, emb_ND: np.ndarray, row_C: np.ndarray) -> tuple[Search, np.ndarray]:
        """Return the search among the distractors in `row_C`, and the largest similarities, ascending."""
        unit_PD = unit_rows(emb_ND[: len(self._label_P)])
        probe_M, mate_M = mates(self._label_P, self._label_P)
        probe_M, mate_M = probe_M[probe_M != mate_M], mate_M[probe_M != mate_M]
        search = Search(len(unit_PD), probe_M, pair_similarity(unit_PD, probe_M, mate_M))
        kept, count = np.empty(0, np.float32), int(_LARGEST_FAR * len(unit_PD) * len(row_C)) + 1
        for _, similarity_PC in gallery_similarity(unit_PD, emb_ND, row_C):
            search.add(similarity_PC)
            least = kept[0] if len(kept) == count else -np.inf
            kept = np.append(kept, similarity_PC[similarity_PC > least])
            kept = np.partition(kept, -count)[-count:] if len(kept) > count else kept
        return search, np.sort(kept)


def _roc(genuine_M: np.ndarray, largest: np.ndarray, impostors: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC as far as the kept impostor similarities reach."""
    far_R, tar_R = roc(genuine_M, largest)
    is_known_R = far_R < 1
    return far_R[is_known_R] * len(largest) / impostors, tar_R[is_known_R]


def _read_probes(path: Path, noise: set[str]) -> tuple[list[str], list[str]]:
    paths, persons = _read_list(path, "path"), _read_list(path, "id")
    if len(paths) != len(persons):
        raise ProtocolFileError(
            f"{path}: expected an id for each path, found {len(paths)} paths and {len(persons)} ids; "
            "copy the file again"
        )
    kept = [i for i, name in enumerate(paths) if name.rpartition("/")[2] not in noise]
    paths, persons = [paths[i] for i in kept], [persons[i] for i in kept]
    if len(set(persons)) == len(persons):
        raise ProtocolFileError(f"{path}: expected two or more images of an identity, found one of each")
    return paths, persons


def _read_distractors(lists: Path, noise: set[str]) -> dict[int, np.ndarray]:
    """Read the names by the size of their list, the largest last."""
    sets = {}
    for size in SIZES:
        path = lists / f"megaface_features_list.json_{size}_1"
        if path.exists():
            names = _read_list(path, "path")
            if len(names) != size:
                raise ProtocolFileError(
                    f"{path}: expected {size} paths, found {len(names)}; copy the file again"
                )
            sets[size] = encoded([f"megaface_images/{name}" for name in names if name not in noise])
    if not sets:
        raise ProtocolFileError(
            f"{lists}: expected megaface_features_list.json_1000000_1, or a shorter list, found none; "
            "unpack the devkit here"
        )
    return sets


def _read_list(path: Path, key: str) -> list[str]:
    try:
        found = bounded_json.read(path, _MOST_BYTES)[key]
    except OSError as error:
        raise missing(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolFileError(
            f'{path}: expected JSON with a list "{key}", found none ({error}); copy the file again'
        ) from error
    if not (isinstance(found, list) and found and all(isinstance(name, str) for name in found)):
        raise ProtocolFileError(f'{path}: expected file names in "{key}", found {type(found).__name__}')
    return found


def _read_noises(path: Path) -> set[str]:
    """Read the names in a noise list, if it exists: the last field of each line without # at its start."""
    try:
        lines = read_data_file(path, _MOST_BYTES).decode("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise missing(path, error) from error
    return {line.strip().rpartition("\t")[2] for line in lines if line.strip() and not line.startswith("#")}
