"""SCFace: images of five surveillance cameras, searched in a gallery of one mugshot each of 130 subjects.

    SCface_database/mugshot_frontal_original_all/001_frontal.jpg
                    surveillance_cameras_distance_1/cam_1/001_cam1_1.jpg       4.2 m away
                    surveillance_cameras_distance_2/cam_1/001_cam1_2.jpg       2.6 m
                    surveillance_cameras_distance_3/cam_1/001_cam1_3.jpg       1.0 m
                    all.txt        name without suffix; x and y of both eyes, the tip of the nose, the mouth

Published tables mix two conventions; both are computed. M. Grgic, K. Delac and S. Grgic, SCface -
surveillance cameras face database, Multimedia Tools and Applications 51(3), 2011; https://www.scface.org .

Shapes: N faces, D dimensions, S subjects, P probes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.evaluation.metrics.identification import Search, cmc
from trainer.evaluation.metrics.similarity import pair_similarity, unit_rows
from trainer.evaluation.protocol import EvaluationProtocol, Faces, ProtocolFileError, Scores, check_embeddings
from trainer.evaluation.protocols.lists import encoded, listing, read_table

SUBJECTS = 130
CAMERAS = (1, 2, 3, 4, 5)
DISTANCES = (1, 2, 3)
# Z. Lu, X. Jiang and A. Kot, Deep coupled ResNet for low-resolution face recognition, IEEE SPL 25(4), 2018,
# fine-tune on 50 subjects and test on the other 80. The subjects were drawn at random and are not published.
_FINE_TUNED = 50
_MUGSHOTS = "mugshot_frontal_original_all"


class SCFace(EvaluationProtocol):
    """SCFace in its folder `SCface_database`: the mugshots, then each distance, camera by camera.

    Raises ProtocolFileError for a missing image or a missing line of coordinates.
    """

    def __init__(self, folder: Path) -> None:
        names = _pictures(folder, _MUGSHOTS, "frontal")
        for distance in DISTANCES:
            for camera in CAMERAS:
                inside = f"surveillance_cameras_distance_{distance}/cam_{camera}"
                names += _pictures(folder, inside, f"cam{camera}_{distance}")
        self.faces = Faces(folder, encoded(names), _landmarks(folder / "all.txt", names))

    def score(self, emb_ND: np.ndarray) -> dict[str, Scores]:
        """Return scores by the name of the convention; see `EvaluationProtocol.score`."""
        check_embeddings(emb_ND, self.faces)
        unit_ND = unit_rows(emb_ND)
        return {
            "all subjects": _score(
                unit_ND,
                np.arange(SUBJECTS),
                "all 130 subjects, 650 probes per distance, not fine-tuned on SCFace",
            ),
            "last 80 subjects": _score(
                unit_ND,
                np.arange(_FINE_TUNED, SUBJECTS),
                "subjects 51 to 130 as gallery, 400 probes per distance; 1 to 50 are for fine-tuning "
                "(published results drew the 50 at random)",
            ),
        }


def _score(unit_ND: np.ndarray, subject_S: np.ndarray, convention: str) -> Scores:
    curves = {f"d{distance}": _cmc(unit_ND, subject_S, distance) for distance in DISTANCES}
    figures = {f"rank_1_{name}": float(curve[0]) for name, curve in curves.items()}
    figures["rank_1_mean"] = float(np.mean(list(figures.values())))
    return Scores(
        figures, f"1:N closed set, one frontal mugshot per subject as gallery: {convention}", cmc=curves
    )


def _cmc(unit_ND: np.ndarray, subject_S: np.ndarray, distance: int) -> np.ndarray:
    first = SUBJECTS * (1 + DISTANCES.index(distance) * len(CAMERAS))
    subject_P = np.tile(subject_S, len(CAMERAS))
    row_P = first + subject_P + SUBJECTS * np.repeat(np.arange(len(CAMERAS)), len(subject_S))
    search = Search(len(row_P), np.arange(len(row_P)), pair_similarity(unit_ND, row_P, subject_P))
    similarity_PS = unit_ND[row_P] @ unit_ND[subject_S].T
    similarity_PS[subject_P[:, None] == subject_S] = -np.inf
    search.add(similarity_PS)
    return cmc(search.first_rank(), len(subject_S))


def _pictures(folder: Path, inside: str, kind: str) -> list[str]:
    """Return paths relative to `folder` of all subjects' images of one kind; names match in either case."""
    found = {name.rpartition(".")[0].lower(): name for name in listing(folder / inside)}
    stems = [f"{subject:03d}_{kind}" for subject in range(1, SUBJECTS + 1)]
    absent = [stem for stem in stems if stem not in found]
    if absent:
        raise ProtocolFileError(
            f"{folder / inside}: expected {SUBJECTS} images, found no {absent[0]}.jpg "
            f"and {len(absent) - 1} more missing; unpack the complete data set"
        )
    return [f"{inside}/{found[stem]}" for stem in stems]


def _landmarks(path: Path, names: list[str]) -> np.ndarray:
    """Read the landmarks, float32 [N, 5, 2].

    SCFace has a single point for the mouth, which is used for both of its corners here: in the least-squares
    transform it then counts as one point of twice the weight.
    """
    line_L = read_table(path, [("name", "S64"), ("eyes_nose_mouth", "f4", (4, 2))])
    line_of = {name.decode("latin-1").lower(): line for line, name in enumerate(line_L["name"])}
    stems = [Path(name).stem.lower() for name in names]
    absent = [stem for stem in stems if stem not in line_of]
    if absent:
        raise ProtocolFileError(
            f"{path}: expected a line for every image, found none for {absent[0]} "
            f"and {len(absent) - 1} more; copy the file from the data set"
        )
    point_N42 = line_L["eyes_nose_mouth"][[line_of[stem] for stem in stems]]
    # The list does not define its left eye: sort both eyes by their x in the image.
    crossed_N = point_N42[:, 0, 0] > point_N42[:, 1, 0]
    point_N42[crossed_N, :2] = point_N42[crossed_N, 1::-1]
    return point_N42[:, [0, 1, 2, 3, 3]]
