"""Pictures in, what a network sees in them out: any number of them, into a file.

    find_files   files and folders -> all files in them, in an order that stays
    _load        threads: file -> upright RGB picture of the network's size, or why it is none
    look         images_BCHW -> embedding and qualities, of the pictures or of them and their mirror images
    embed        a batch after the other, into a file

The faces are aligned already, as those that the network was trained on. Pictures of another size are resized.
A file that is no picture costs a row, not the work of a night.

Shapes: B pictures of a batch, N of all; D the embedding's length; K branches.
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
from data_pipeline.common.pillow_decode import DecodeError, wrong_size
from data_pipeline.formats.image_folder import listed
from trainer.backbones import Backbone
from trainer.backbones.lgaf import LGAF
from trainer.inference.embedding_file import Columns, opener
from trainer.inference.images import ahead, open_picture, resized, to_network
from trainer.inference.network import Network

Report = Callable[[int, int], None]


class Embedded(NamedTuple):
    """How many files were looked at, and the path and the fault of each that is no picture."""

    files: int
    bad: list[tuple[str, str]]


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """All files under `paths`, in their order, those of a folder in natural order (s2 before s10).

    What begins with a dot is left out, but for `paths` themselves. Raises FileNotFoundError for a path that
    is not there.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: expected a picture or a folder of pictures, found nothing")
        yield from _files_in(path)


def _files_in(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path  # a link that leads nowhere too, which is an error of its own row
        return
    for inner in listed(path):
        yield from _files_in(inner)


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
    """Write a row for each file under `paths` to `out`; `report` is told how many are done, and of how many.

    `facts` are written along. Raises ValueError if no file is a picture, or for a name that is no format's.
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
            raise ValueError(f"expected pictures, found {len(files)} files and none that is one{first}")
        file.close()
    return Embedded(len(files), bad)


def look(model: Backbone, images_BHWC: np.ndarray, *, flip: bool) -> Columns:
    """What the network sees in pictures uint8 [B, S, S, 3]: the columns of `embedding_file` but for two.

    With `flip`, all is the mean over a picture and its mirror image.
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


def read_picture(path: Path, image_size: int) -> np.ndarray:
    """The picture in a file, upright as its EXIF data say, uint8 [S, S, 3] with S = `image_size`.

    Raises DecodeError, naming the file, if it cannot be read or is no picture of a usual size.
    """
    image = open_picture(path)
    reason = wrong_size(*image.size)
    if reason is not None:
        raise DecodeError(str(path), reason)
    return np.asarray(resized(image, image_size))


def _rows(network: Network, files: list[Path], batch_size: int, flip: bool) -> Iterator[Columns]:
    load = partial(_load, image_size=network.image_size)
    threads = len(os.sched_getaffinity(0))
    done = 0
    for batch in ahead(load, files, batch_size=batch_size, threads=threads):
        pictures, errors = zip(*batch, strict=True)
        columns = look(network.model, np.stack(pictures), flip=flip)
        error_B = np.array(errors)
        for values in columns.values():
            values[error_B != ""] = np.nan
        path_B = np.array([_text(path) for path in files[done : done + len(batch)]])
        yield {"path": path_B, **columns, "error": error_B}
        done += len(batch)


def _load(path: Path, image_size: int) -> tuple[np.ndarray, str]:
    """The picture and no error, or a black one and why it is none."""
    try:
        return read_picture(path, image_size), ""
    except DecodeError as error:
        return np.zeros((image_size, image_size, 3), np.uint8), error.reason


def _text(path: Path) -> str:
    """A path as text; bytes of its name that are no UTF-8 as \\udc.. escapes, which every format can hold."""
    return str(path).encode("utf-8", "backslashreplace").decode()
