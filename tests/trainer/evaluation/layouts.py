"""Small stand-ins of the published data sets, in their official layouts, with images of one colour."""

import io
import json
from functools import cache

import numpy as np
from PIL import Image

from trainer.inference.alignment import TEMPLATE_52


@cache
def image_bytes(suffix, size=16):
    encoded = io.BytesIO()
    Image.new("RGB", (size, size), (200, 120, 90)).save(encoded, "PNG" if suffix == "png" else "JPEG")
    return encoded.getvalue()


def put_image(path, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(path.suffix[1:].lower(), size))


def write_ijb(folder, faces, pairs, galleries, probes, prefix="ijbc"):
    """`faces` are (template, medium, confidence), `pairs` (template, template, label), and galleries and
    probes lists of (template, subject)."""
    meta = folder / "meta"
    meta.mkdir(parents=True)
    points = " ".join(f"{value:.3f}" for value in TEMPLATE_52.ravel())
    names = [f"{i}.jpg" for i in range(1, len(faces) + 1)]
    for name in names:
        put_image(folder / "loose_crop" / name, 112)

    def write(name, lines):
        (meta / f"{prefix}_{name}").write_text("".join(line + "\n" for line in lines))

    write(
        "name_5pts_score.txt", [f"{name} {points} {face[2]}" for name, face in zip(names, faces, strict=True)]
    )
    write(
        "face_tid_mid.txt", [f"{name} {face[0]} {face[1]}" for name, face in zip(names, faces, strict=True)]
    )
    write("template_pair_label.txt", [f"{left} {right} {label}" for left, right, label in pairs])
    tables = dict(zip(("S1", "S2") if prefix == "ijbb" else ("G1", "G2"), galleries, strict=True))
    tables = {f"gallery_{name}": rows for name, rows in tables.items()} | {"probe_mixed": probes}
    for name, rows in tables.items():
        # A line for each face of a template, as published.
        lines = [
            f"{template},{subject},img/{subject}.jpg,1,2" for template, subject in rows for _ in range(2)
        ]
        write(f"1N_{name}.csv", ["TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X,FACE_Y", *lines])
    return folder


def write_tinyface(folder, probes, matched, distractors):
    for kind, names in (("Probe", probes), ("Gallery_Match", matched), ("Gallery_Distractor", distractors)):
        for name in names:
            put_image(folder / kind / name)
    return folder


def write_scface(folder):
    """All 130 subjects; the file of coordinates names the eye on the image's right first."""
    names = [f"mugshot_frontal_original_all/{subject:03d}_frontal.jpg" for subject in range(1, 131)]
    for distance in (1, 2, 3):
        for camera in range(1, 6):
            inside = f"surveillance_cameras_distance_{distance}/cam_{camera}"
            names += [f"{inside}/{subject:03d}_cam{camera}_{distance}.jpg" for subject in range(1, 131)]
    eye, other_eye, nose, left, right = TEMPLATE_52
    points = " ".join(f"{value:.2f}" for value in np.ravel([other_eye, eye, nose, (left + right) / 2]))
    for name in names:
        put_image(folder / name)
    stems = [name.rpartition("/")[2][:-4] for name in reversed(names)]
    (folder / "all.txt").write_text("".join(f"{stem}\t{points}\n" for stem in stems))
    return folder


def write_megaface(folder, probes, distractors, *, images=True):
    """`probes` are (path, person), `distractors` lists of paths by the size that the list is called after."""
    lists = folder / "devkit" / "templatelists"
    lists.mkdir(parents=True)
    probe_list = {"path": [path for path, _ in probes], "id": [person for _, person in probes]}
    (lists / "facescrub_features_list.json").write_text(json.dumps(probe_list))
    for size, paths in distractors.items():
        (lists / f"megaface_features_list.json_{size}_1").write_text(json.dumps({"path": paths}))
    if images:
        for path, _ in probes:
            put_image(folder / "facescrub_images" / path)
        for path in {path for paths in distractors.values() for path in paths}:
            put_image(folder / "megaface_images" / path)
    return folder
