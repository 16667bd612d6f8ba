"""A folder of images with one sub-folder per identity becomes an InsightFace dataset.

The sub-folders, in natural order (s2 before s10), are the classes 0, 1, 2, ... Each image is cropped to its
central square, resized, and stored as a colour JPEG; a JPEG of the right size is stored byte for byte.
`identities.tsv` keeps the names of the classes.

The last few identities may be held out: they are not packed, and `held_out.bin` asks of pairs of their images
whether they show one person. A network that never saw these people is to answer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data_pipeline import counter
from data_pipeline.image_folder import listed
from data_pipeline.insightface import InsightFaceWriter
from data_pipeline.verification import write_pairs

_PAIR_STREAM = 32
# As many as in the published sets (LFW has 6,000 pairs, CFP-FP 7,000).
_MOST_PAIRS = 6000


@dataclass(frozen=True)
class PackSummary:
    """What was packed: `kept_images` of the `images` were stored byte for byte; `pairs` are held out."""

    folder: Path
    identities: int
    images: int
    kept_images: int
    image_bytes: int
    pairs: int = 0


def pack_folder(
    folder: Path,
    out: Path,
    *,
    size: int = 112,
    quality: int = 95,
    hold_out: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack the images of `folder` into `out`: train.rec, train.idx, property, identities.tsv.

    `size` is the stored width and height in pixels, `quality` that of the JPEGs (1 to 95); the last
    `hold_out` identities go into held_out.bin instead. After every image `progress` is called with the
    number of images done and of all images.

    Raises ValueError if `out` is not empty, if `folder` has no identity folders or an empty one, if too few
    are held out or left, or, naming the file, if an image cannot be read; then nothing has appeared in `out`.
    """
    _require_empty(out)
    files_by_identity, held_out = _split(folder, _identities(folder), hold_out)
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
        # Last in the block, whose failure leaves nothing behind.
        pairs = _write_held_out(out / "held_out.bin", held_out, size, quality)
    return PackSummary(out, len(files_by_identity), done, kept, stored_bytes, pairs)


def _split(
    folder: Path, files_by_identity: dict[str, list[Path]], hold_out: int
) -> tuple[dict[str, list[Path]], list[list[Path]]]:
    """The identities to pack, and the files of those that are held out."""
    names = list(files_by_identity)
    held_out = [files_by_identity[name] for name in names[len(names) - hold_out :]]
    if hold_out and (hold_out < 2 or hold_out >= len(names) or not any(len(files) > 1 for files in held_out)):
        raise ValueError(
            f"{folder}: expected to hold out at least 2 of the {len(names)} identities, one of them with "
            f"2 images, and to keep at least 1, found {hold_out} to hold out; change their number"
        )
    return {name: files_by_identity[name] for name in names[: len(names) - hold_out]}, held_out


def _write_held_out(path: Path, held_out: list[list[Path]], size: int, quality: int) -> int:
    """Write as many pairs of one person as of two; returns their number, 0 if nobody is held out."""
    if not held_out:
        return 0
    image_2P, issame_P = _pairs_of([len(files) for files in held_out])
    files = [file for files in held_out for file in files]
    encoded = {i: _jpeg(files[i], size, quality)[0] for i in np.unique(image_2P).tolist()}
    write_pairs(path, [encoded[i] for i in image_2P.tolist()], issame_P.tolist())
    return len(issame_P)


def _pairs_of(count_I: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs among the images 0, 1, 2... of I people: image numbers [2P] and truths [P], in turns.

    The pairs of one person and as many of two, up to _MOST_PAIRS in all, drawn evenly where there are more.
    """
    start_I = np.cumsum([0, *count_I[:-1]])
    within = [np.stack(np.triu_indices(count, 1), axis=1) for count in count_I]
    genuine_Q2 = np.concatenate([pair + start for pair, start in zip(within, start_I, strict=True)])
    order_Q = np.argsort(counter.words(0, np.arange(len(genuine_Q2)), _PAIR_STREAM)[0], kind="stable")
    person_N = np.repeat(np.arange(len(count_I)), count_I)
    # Most draws are of two people, and few are drawn twice: four times as many as needed will do.
    draw_Q2 = counter.words(1, np.arange(4 * _MOST_PAIRS), _PAIR_STREAM)[:2].T.astype(np.int64) % len(
        person_N
    )
    draw_Q2 = np.sort(draw_Q2[person_N[draw_Q2[:, 0]] != person_N[draw_Q2[:, 1]]], axis=1)
    _, first_seen = np.unique(draw_Q2, axis=0, return_index=True)
    impostor_Q2 = draw_Q2[np.sort(first_seen)]
    each = min(len(genuine_Q2), len(impostor_Q2), _MOST_PAIRS // 2)
    image_P2 = np.stack([genuine_Q2[order_Q[:each]], impostor_Q2[:each]], axis=1).reshape(-1, 2)
    return image_P2.ravel(), np.tile([True, False], each)


def _require_empty(out: Path) -> None:
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names or not out.is_dir():
        found = f"{len(names)} entries ({', '.join(names[:5])})" if names else "a file"
        raise ValueError(f"{out}: expected an empty folder to pack into, found {found}; choose another name")


def _identities(folder: Path) -> dict[str, list[Path]]:
    """The files of each identity folder, all in natural order; what starts with a dot does not count."""
    folders = [path for path in listed(folder) if path.is_dir()] if folder.is_dir() else []
    if not folders:
        raise ValueError(
            f"{folder}: expected a folder with one sub-folder of images per identity, "
            f"found {'no sub-folder' if folder.is_dir() else 'no such folder'}"
        )
    files_by_identity = {path.name: listed(path) for path in folders}
    for name, files in files_by_identity.items():
        if not files:
            raise ValueError(f"{folder / name}: expected the images of one identity, found none; remove it")
    return files_by_identity


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
