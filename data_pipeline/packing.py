"""A folder of images with one sub-folder per identity becomes an InsightFace dataset.

The sub-folders, in natural order (s2 before s10), are the classes 0, 1, 2, ... Each image is cropped to its
central square, resized, and stored as a colour JPEG; a JPEG of the right size is stored byte for byte.
`identities.tsv` keeps the names of the classes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data_pipeline.insightface import InsightFaceWriter


@dataclass(frozen=True)
class PackSummary:
    """What was packed: `kept_images` of the `images` were stored byte for byte."""

    folder: Path
    identities: int
    images: int
    kept_images: int
    image_bytes: int


def pack_folder(
    folder: Path,
    out: Path,
    *,
    size: int = 112,
    quality: int = 95,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack the images of `folder` into `out`: train.rec, train.idx, property, identities.tsv.

    `size` is the stored width and height in pixels, `quality` that of the JPEGs (1 to 95); after every
    image `progress` is called with the number of images done and of all images.

    Raises ValueError if `out` is not empty, if `folder` has no identity folders or an empty one, or, naming
    the file, if an image cannot be read; then nothing has appeared in `out`.
    """
    _require_empty(out)
    files_by_identity = _identities(folder)
    total = sum(map(len, files_by_identity.values()))
    done = kept = stored_bytes = 0
    with InsightFaceWriter(out, size=size) as writer:
        for identity, files in enumerate(files_by_identity.values()):
            for file in files:
                image, is_original = _jpeg(file, size, quality)
                writer.add(image, float(identity))
                done, kept, stored_bytes = done + 1, kept + is_original, stored_bytes + len(image)
                if progress is not None:
                    progress(done, total)
        writer.add_text("identities.tsv", _names_table(files_by_identity))
    return PackSummary(out, len(files_by_identity), done, kept, stored_bytes)


def _require_empty(out: Path) -> None:
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names or not out.is_dir():
        found = f"{len(names)} entries ({', '.join(names[:5])})" if names else "a file"
        raise ValueError(f"{out}: expected an empty folder to pack into, found {found}; choose another name")


def _identities(folder: Path) -> dict[str, list[Path]]:
    """The files of each identity folder, all in natural order; what starts with a dot does not count."""
    folders = [path for path in _listed(folder) if path.is_dir()] if folder.is_dir() else []
    if not folders:
        raise ValueError(
            f"{folder}: expected a folder with one sub-folder of images per identity, "
            f"found {'no sub-folder' if folder.is_dir() else 'no such folder'}"
        )
    files_by_identity = {path.name: _listed(path) for path in folders}
    for name, files in files_by_identity.items():
        if not files:
            raise ValueError(f"{folder / name}: expected the images of one identity, found none; remove it")
    return files_by_identity


def _listed(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sorts numbers inside names by value: text and numbers take turns, so like meets like."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], path.name


def _names_table(files_by_identity: dict[str, list[Path]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, dialect="excel-tab", lineterminator="\n")
    table.writerow(("class", "folder", "images"))
    table.writerows((i, name, len(files)) for i, (name, files) in enumerate(files_by_identity.items()))
    return text.getvalue()


def _jpeg(file: Path, size: int, quality: int) -> tuple[bytes, bool]:
    """The bytes to store of one image file, and whether they are the file's own."""
    try:
        with Image.open(file) as image:
            # Decoded in any case, so that damage is found now and not in training.
            image.load()
            if _is_stored_as_is(image, size):
                return file.read_bytes(), True
            square = ImageOps.fit(_upright_rgb(image), (size, size), Image.Resampling.BICUBIC)
    # Pillow's readers raise more kinds of errors on damaged files than they document.
    except Exception as error:
        raise ValueError(
            f"{file}: expected an image, found: {error}; repair it, or remove it from the folder"
        ) from error
    encoded = io.BytesIO()
    square.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue(), False


def _is_stored_as_is(image: Image.Image, size: int) -> bool:
    """Readers turn a grey JPEG into RGB, but do not agree on CMYK and on rotation by EXIF."""
    is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.size == (size, size) and image.mode in ("L", "RGB") and is_upright


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, with 8 bits per channel; Pillow itself would cut 16-bit grey off at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey_HW = np.asarray(image)
        if image.mode == "F" or grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} beyond 16 bits, whose white is not known")
        image = Image.fromarray(np.rint(grey_HW / 257).astype(np.uint8))
    return image.convert("RGB")
