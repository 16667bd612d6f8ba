"""Packing of image files into a dataset, in RecordIO or in tar shards.

The source is either a folder with one sub-folder per identity, which in natural order (s2 before s10) are the
classes 0, 1, 2, ..., or a list with the path and the class of each image. Each image is cropped to its
central square, resized, and stored as a colour JPEG; a JPEG of the right size is stored byte for byte. All
cores encode, and the images are written in order. The last identities of a folder can be held out: they are
not packed but become the verification set `held_out.bin`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data_pipeline import philox
from data_pipeline.common.atomic_write import staged
from data_pipeline.common.data_file import lines_of
from data_pipeline.common.image_header import SIDES_PX
from data_pipeline.common.pillow_decode import DecodeError, TooLargeError, decoded, read_encoded
from data_pipeline.common.process_pool import CRASHES, WorkerDiedError, first_crashing, in_order
from data_pipeline.formats.container import LARGEST_LABEL, Progress
from data_pipeline.formats.image_folder import listed
from data_pipeline.formats.pair_file import write_pairs
from data_pipeline.formats.recordio_writer import FlatWriter, InsightFaceWriter
from data_pipeline.formats.tar_writer import ShardWriter

Format = Literal["rec", "tar"]

_PAIR_STREAM = 32
# About the number of pairs in the published sets (LFW has 6,000 pairs, CFP-FP 7,000).
_MOST_PAIRS = 6000
# Formats that are converted, by Pillow's names, beside those that training reads. Their decoders run only in
# the pool's processes, because the libraries for some of them have crashed on damaged files.
_CONVERTED = ("TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
# A longer line is read in parts. The csv module refuses a field of half this length.
_MOST_LINE_CHARS = 1 << 18
_AT_ONCE = 16  # number of images that a process encodes per message


@dataclass(frozen=True)
class PackSummary:
    """Summary of a packed dataset: `kept_images` are stored byte for byte; `pairs` are held out."""

    folder: Path
    identities: int
    images: int
    kept_images: int
    image_bytes: int
    pairs: int = 0


@dataclass(frozen=True)
class PackOptions:
    """The packed form of the images.

    `size` is the stored width and height in pixels, `quality` the JPEG quality (1 to 95), `shard_samples` the
    number of images in a tar shard. An image with a side above `max_side` pixels is refused.
    """

    form: Format = "rec"
    size: int = 112
    quality: int = 95
    shard_samples: int = 10_000
    max_side: int = SIDES_PX[1]


class _Writer(Protocol):
    def add(self, image: bytes, label: int, /) -> None: ...


def pack_folder(
    folder: Path,
    out: Path,
    options: PackOptions = PackOptions(),
    *,
    hold_out: int = 0,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack the images of `folder` into `out`: train.rec, train.idx and property, or shards; identities.tsv.

    The last `hold_out` identities go into held_out.bin instead; identities.tsv lists the sub-folder of each
    class. `progress` is called after every image with the number of images done and of all images.

    Raises ValueError if `out` is not empty, if `folder` has no identity folders or an empty one, if too few
    identities are held out or left, or if an image cannot be read, with the file's name; OSError if the disk
    is full. After an error `out` is unchanged.
    """
    files_by_identity, held_out = _split(folder, _identities(folder), hold_out)
    items = ((file, i) for i, files in enumerate(files_by_identity.values()) for file in files)
    total = sum(map(len, files_by_identity.values()))
    with staged(out) as partial:
        writer = (
            InsightFaceWriter(partial, size=options.size)
            if options.form == "rec"
            else ShardWriter(partial, samples=options.shard_samples)
        )
        stored = _store(items, total, writer, options, progress)
        (partial / "identities.tsv").write_text(
            _names_table(files_by_identity), encoding="utf-8", errors="surrogateescape"
        )
        pairs = _write_held_out(partial / "held_out.bin", held_out, options)
    return PackSummary(out, len(files_by_identity), *stored, pairs)


def pack_list(
    listed: Path,
    out: Path,
    options: PackOptions = PackOptions(),
    *,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack the images that the file `listed` names, in its order, each with its class, into `out`.

    The lines are `path<TAB>label`, or with a comma if the file's name ends in .csv; a first line with the
    columns `path` and `label` may change their order. Paths are relative to the file's folder. Labels that
    float32 cannot hold go into a sidecar of whole numbers.

    Raises ValueError, which names the line, for a line of another form; else as `pack_folder` does.
    """
    # The list is read once to find errors before anything is written, and once to write.
    label_N = np.frombuffer(array("q", (label for _, label in _rows(listed))), np.int64)
    if not len(label_N):
        raise ValueError(f"{listed}: expected lines 'path<TAB>label', found none")
    with staged(out) as partial:
        writer = (
            FlatWriter(partial, image_size=(options.size, options.size))
            if options.form == "rec"
            else ShardWriter(partial, samples=options.shard_samples)
        )
        stored = _store(_rows(listed), len(label_N), writer, options, progress)
    return PackSummary(out, len(np.unique(label_N)), *stored)


def _store(
    items: Iterable[tuple[Path, int]],
    total: int,
    writer: AbstractContextManager[_Writer],
    options: PackOptions,
    progress: Progress | None,
) -> tuple[int, int, int]:
    """Write all (file, label); return the numbers of images, of images kept unchanged, and of bytes."""
    done = kept = stored_bytes = 0
    with writer as opened, contextlib.closing(_jpegs(items, options)) as results:
        for image, label, is_original in results:
            opened.add(image, label)
            done, kept, stored_bytes = done + 1, kept + is_original, stored_bytes + len(image)
            if progress is not None:
                progress(done, total)
    return done, kept, stored_bytes


def _jpegs(items: Iterable[tuple[Path, int]], options: PackOptions) -> Generator[tuple[bytes, int, bool]]:
    """Yield `_encoded` of all (file, label), computed by the process pool."""
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, _AT_ONCE)), [])
    try:
        with contextlib.closing(in_order(_encoded, ((chunk, options) for chunk in chunks))) as results:
            for result in results:
                yield from result
    except WorkerDiedError as error:
        crashing = first_crashing(_encoded, (([item], options) for item in error.arguments[0]))
        if crashing is None:
            raise
        [[(file, _)], _] = crashing
        raise ValueError(f"{file}: {CRASHES}; remove it from the folder") from error


def _encoded(chunk: list[tuple[Path, int]], options: PackOptions) -> list[tuple[bytes, int, bool]]:
    """Return for each (file, label) the bytes to store, the label, and True if the file is kept unchanged."""
    encoded = []
    for file, label in chunk:
        image, is_original = _jpeg(file, options)
        encoded.append((image, label, is_original))
    return encoded


def _rows(listed: Path) -> Iterator[tuple[Path, int]]:
    """Yield file and label of every line of a list."""
    delimiter = "," if listed.suffix.lower() == ".csv" else "\t"
    wanted = "path,label" if delimiter == "," else "path<TAB>label"
    with contextlib.closing(lines_of(listed, _MOST_LINE_CHARS, "utf-8", "surrogateescape")) as lines:
        table = csv.reader(lines, delimiter=delimiter)
        path_at, label_at, width = 0, 1, 2
        try:
            for row in table:
                if table.line_num == 1 and {"path", "label"} <= set(row):
                    path_at, label_at, width = row.index("path"), row.index("label"), len(row)
                    continue
                if not row:
                    continue
                label = row[label_at].strip() if len(row) == width else ""
                is_whole = label.isascii() and label.isdigit() and len(label) < 20
                if not is_whole or int(label) > LARGEST_LABEL or not row[path_at]:
                    raise ValueError(
                        f"{listed}: line {table.line_num} is {delimiter.join(row)[:80]!r}, expected "
                        f"'{wanted}' with a whole number from 0 to {LARGEST_LABEL} as label; correct it"
                    )
                yield listed.parent / row[path_at], int(label)
        except csv.Error as error:
            raise ValueError(f"{listed}: line {table.line_num} is not a table row: {error}") from error


def _split(
    folder: Path, files_by_identity: dict[str, list[Path]], hold_out: int
) -> tuple[dict[str, list[Path]], list[list[Path]]]:
    """Return the identities to pack, and the files of the held-out identities."""
    names = list(files_by_identity)
    held_out = [files_by_identity[name] for name in names[len(names) - hold_out :]]
    if hold_out and not 2 <= hold_out < len(names):
        raise ValueError(
            f"{folder}: expected to hold out 2 to {len(names) - 1} of its {len(names)} identities, found "
            f"{hold_out}; change this number"
        )
    if hold_out and not any(len(files) > 1 for files in held_out):
        raise ValueError(
            f"{folder}: expected a genuine pair among the held-out identities, the last {hold_out}, found "
            "one image of each; hold out more identities, or add images"
        )
    return {name: files_by_identity[name] for name in names[: len(names) - hold_out]}, held_out


def _write_held_out(path: Path, held_out: list[list[Path]], options: PackOptions) -> int:
    """Write as many genuine as impostor pairs; return their number, 0 if no identity is held out."""
    if not held_out:
        return 0
    image_2P, issame_P = _pairs_of([len(files) for files in held_out])
    files = [file for files in held_out for file in files]
    jpegs = _jpegs(((files[i], i) for i in np.unique(image_2P).tolist()), options)
    encoded = {i: image for image, i, _ in jpegs}
    write_pairs(path, [encoded[i] for i in image_2P.tolist()], issame_P.tolist())
    return len(issame_P)


def _pairs_of(count_I: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of the images 0, 1, 2... of I identities: image numbers [2P] and `issame` [P].

    Genuine and impostor pairs alternate. If there are more than _MOST_PAIRS in all, so many are drawn.
    """
    start_I = np.cumsum([0, *count_I[:-1]])
    within = [np.stack(np.triu_indices(count, 1), axis=1) for count in count_I]
    genuine_Q2 = np.concatenate([pair + start for pair, start in zip(within, start_I, strict=True)])
    order_Q = np.argsort(philox.words(0, np.arange(len(genuine_Q2)), _PAIR_STREAM)[0], kind="stable")
    person_N = np.repeat(np.arange(len(count_I)), count_I)
    # Most draws are impostor pairs, and few are drawn twice, so that four times _MOST_PAIRS draws suffice.
    draw_Q2 = philox.words(1, np.arange(4 * _MOST_PAIRS), _PAIR_STREAM)[:2].T.astype(np.int64) % len(person_N)
    draw_Q2 = np.sort(draw_Q2[person_N[draw_Q2[:, 0]] != person_N[draw_Q2[:, 1]]], axis=1)
    _, first_seen = np.unique(draw_Q2, axis=0, return_index=True)
    impostor_Q2 = draw_Q2[np.sort(first_seen)]
    each = min(len(genuine_Q2), len(impostor_Q2), _MOST_PAIRS // 2)
    image_P2 = np.stack([genuine_Q2[order_Q[:each]], impostor_Q2[:each]], axis=1).reshape(-1, 2)
    return image_P2.ravel(), np.tile([True, False], each)


def _identities(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each identity folder in natural order, without names that start with a dot."""
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


def _jpeg(file: Path, options: PackOptions) -> tuple[bytes, bool]:
    """Return the bytes to store for one image file, and True if they are the unchanged file."""
    try:
        original = read_encoded(file)
        # Every image is decoded, so that damage is found now and not in training.
        image = decoded(original, str(file), max_side=options.max_side, other_formats=_CONVERTED)
        if _is_stored_as_is(image, options.size):
            return original.tobytes(), True
        square = ImageOps.fit(_upright_rgb(image), (options.size, options.size), Image.Resampling.BICUBIC)
    # Pillow does not document all exceptions that its readers raise for damaged files.
    except Exception as error:
        reason = error.reason if isinstance(error, DecodeError) else error
        advice = "raise --max-image-side" if isinstance(error, TooLargeError) else "repair it"
        raise ValueError(
            f"{file}: expected an image, found: {reason}; {advice}, or remove it from the folder"
        ) from error
    encoded = io.BytesIO()
    square.save(encoded, "JPEG", quality=options.quality)
    return encoded.getvalue(), False


def _is_stored_as_is(image: Image.Image, size: int) -> bool:
    """Return True for an upright JPEG, grey or RGB, of the right size."""
    # All decoders convert a grey JPEG to RGB, but they treat CMYK and the EXIF rotation differently.
    is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.size == (size, size) and image.mode in ("L", "RGB") and is_upright


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image rotated by its EXIF data, as RGB with 8 bits per channel."""
    image = ImageOps.exif_transpose(image)
    # Pillow's own conversion clips 16-bit grey at 255.
    if image.mode.startswith(("I", "F")):
        grey_HW = np.asarray(image)
        if image.mode == "F" or grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} beyond 16 bits, expected at most 16 bits")
        image = Image.fromarray(np.rint(grey_HW / 257).astype(np.uint8))
    return image.convert("RGB")
