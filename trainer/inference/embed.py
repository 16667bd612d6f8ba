"""Embeddings of any number of image files, written to one file.

    find_files   files and folders -> all files in them, in a fixed order
    _load        in threads: file -> upright RGB image of the network's size, or the reason for its failure
    look         images -> embeddings and qualities, with or without the mirror images
    embed        one batch after the other -> the output file

The faces must be aligned like those of the training set. Images of another size are resized. A file that
cannot be read as an image gets a row with the error, and does not end the run.

Shapes: B images of a batch, N of all; D the embedding's dimensions; K branches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.common.atomic_write import staged_file
from data_pipeline.common.image_header import wrong_size
from data_pipeline.common.pillow_decode import DecodeError
from data_pipeline.formats.image_folder import listed
from trainer.backbones import Backbone
from trainer.backbones.lgaf import LGAF
from trainer.inference.embedding_file import Columns, opener
from trainer.inference.images import ahead, open_image, resized, to_network
from trainer.inference.network import Network

Report = Callable[[int, int], None]


class Embedded(NamedTuple):
    """The number of files, and the path and error of each that could not be read as an image."""

    files: int
    bad: list[tuple[str, str]]


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield all files under `paths`, in their order; those of a folder in natural order (s2 before s10).

    Names that begin with a dot are skipped, except `paths` themselves. Raises FileNotFoundError for a missing
    path, and ValueError for a folder that links make part of a path twice: a link to a parent would repeat
    its files, and two such links would do so 2^40 times.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected an image or a folder of images, found no such path")
        yield from _files_in(path, {})


def _files_in(path: Path, seen: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """Yield the files under a path; `seen` are the folders so far, by device and inode."""
    if not path.is_dir():
        yield path  # broken links too: each gets a row with its error
        return
    found = path.stat()
    first = seen.setdefault((found.st_dev, found.st_ino), path)
    if first is not path:
        raise ValueError(f"{path}: expected every folder once, found {first} again; remove this link")
    for inner in listed(path):
        yield from _files_in(inner, seen)


def embed(
    network: Network,
    paths: Sequence[Path],
    out: Path,
    *,
    batch_size: int,
    flip: bool,
    facts: dict[str, str],
    report: Report,
) -> Embedded:
    """Write a row for each file under `paths` to `out`.

    facts: values that apply to all rows, also written. report: called with the numbers of files done and of
    all files. Raises ValueError if no file can be read as an image, or if `out` has an unknown suffix.
    """
    open_file, files = opener(out), list(find_files(paths))
    facts = {
        "image_size": str(network.image_size),
        "step": str(network.step),
        "flip": str(flip).lower(),
    } | facts
    bad: list[tuple[str, str]] = []
    with staged_file(out) as unfinished:
        file = open_file(unfinished, facts)
        done = 0
        for columns in _rows(network, files, batch_size, flip):
            is_bad = columns["error"] != ""
            bad += zip(columns["path"][is_bad].tolist(), columns["error"][is_bad].tolist(), strict=True)
            file.write(columns)
            done += len(is_bad)
            report(done, len(files))
        if len(bad) == len(files):
            first = f"; the first: {': '.join(bad[0])}" if bad else ""
            raise ValueError(
                f"expected images, found {len(files)} files of which none could be read as an image{first}"
            )
        file.close()
    return Embedded(len(files), bad)


def look(model: Backbone, images_BHWC: np.ndarray, *, flip: bool) -> Columns:
    """Return the columns of `embedding_file`, except path and error, for images uint8 [B, S, S, 3].

    With `flip`, each value is the mean over an image and its mirror image.
    """
    images_BCHW = to_network(images_BHWC, next(model.parameters()).device)
    views = [images_BCHW, images_BCHW.flip(3)] if flip else [images_BCHW]
    seen = [_seen(model, view_BCHW) for view_BCHW in views]
    mean = {name: torch.stack([one[name] for one in seen]).mean(0).cpu().numpy() for name in seen[0]}
    emb_BD = mean.pop("embedding")
    return {"embedding": emb_BD, "quality": np.linalg.norm(emb_BD, axis=1), **mean}


@torch.inference_mode()
def _seen(model: Backbone, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    if not isinstance(model, LGAF):
        return {"embedding": model(images_BCHW).emb_BD}
    fusion = model.fuse(images_BCHW)
    return {
        "embedding": fusion.emb_BD,
        "branch_norm": fusion.norm_BK,
        "branch_quality": fusion.quality_BK,
        "branch_weight": fusion.weight_BK,
    }


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Read the image in a file, upright by its EXIF data, as uint8 [S, S, 3] with S = `image_size`.

    Raises DecodeError, naming the file, if it cannot be read as an image or its size is out of range.
    """
    image = open_image(path)
    reason = wrong_size(*image.size)
    if reason is not None:
        raise DecodeError(str(path), reason)
    return np.asarray(resized(image, image_size))


def _rows(network: Network, files: list[Path], batch_size: int, flip: bool) -> Iterator[Columns]:
    load = partial(_load, image_size=network.image_size)
    threads = len(os.sched_getaffinity(0))
    done = 0
    for batch in ahead(load, files, batch_size=batch_size, threads=threads):
        images_BHWC, errors = zip(*batch, strict=True)
        columns = look(network.model, np.stack(images_BHWC), flip=flip)
        error_B = np.array(errors)
        for values in columns.values():
            values[error_B != ""] = np.nan
        path_B = np.array([_text(path) for path in files[done : done + len(batch)]])
        yield {"path": path_B, **columns, "error": error_B}
        done += len(batch)


def _load(path: Path, image_size: int) -> tuple[np.ndarray, str]:
    """Return the image and an empty error, or a black image and the error."""
    try:
        return read_image(path, image_size), ""
    except DecodeError as error:
        return np.zeros((image_size, image_size, 3), np.uint8), error.reason


def _text(path: Path) -> str:
    """Return a path as text; bytes that are not UTF-8 become \\udc.. escapes, which all formats can store."""
    return str(path).encode("utf-8", "backslashreplace").decode()
