"""A synthetic set as a folder: an InsightFace dataset, a verification set, and the nuisances of every image.

    train.rec, train.idx, property    training identities; labels alternate: scalar and [class, aligned]
    held_out.bin                      pairs of held-out identities
    train_nuisances.tsv               one row per training image, under its record key
    held_out_nuisances.tsv            one row per image of held_out.bin, under its number there
    synth.json                        the configuration, and the sizes of the files

All files are written into a hidden folder beside the final one, which is renamed when they are complete.
Several processes render; the images are written in order, and only a few are in memory.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, get_type_hints

import numpy as np

from data_pipeline.common import bounded_json
from data_pipeline.common.atomic_write import staged
from data_pipeline.common.process_pool import in_order
from data_pipeline.formats.pair_file import write_pairs
from data_pipeline.formats.recordio import FLOAT32_EXACT
from data_pipeline.formats.recordio_writer import InsightFaceWriter
from data_pipeline.synthetic.face import Nuisances
from data_pipeline.synthetic.identities import AT_ONCE, SynthConfig, SynthImage, pairs_of, render_images

# Part of every set's description. Increase it with any change to the random draws or to the rendering.
RENDERER_VERSION = 1
PAIRS_FILE = "held_out.bin"
TRAIN_NUISANCES = "train_nuisances.tsv"
PAIRS_NUISANCES = "held_out_nuisances.tsv"

_DESCRIPTION = "synth.json"
_LARGEST_DESCRIPTION = 1 << 20

_COLUMNS = np.dtype(
    [("key", np.int64), ("identity", np.int64), ("number", np.int64)]
    + [(name, {float: "f4", int: "i8", str: "U16"}[kind]) for name, kind in get_type_hints(Nuisances).items()]
)


def write_set(folder: Path, config: SynthConfig, progress: Callable[[int, int], None] | None = None) -> bool:
    """Write the set of `config` into `folder`, which must be new or empty, and return True.

    Returns False if the folder already holds exactly this set. `progress` is called with the numbers of
    images done and of all images.

    Raises ValueError if the folder has other content, if another process is writing it, or if the set is too
    large for the format.
    """
    _require_room_in_format(config)
    folder = folder.resolve()
    if _holds_the_set(folder, config):
        return False
    with staged(folder) as partial:
        with contextlib.closing(rendered_images(config, progress or (lambda done, total: None))) as stream:
            _write_training(partial, config, islice(stream, config.images))
            _write_pairs(partial, config, stream)
        _describe(partial, config)
    return True


def _require_room_in_format(config: SynthConfig) -> None:
    if config.images + config.identities + 1 > FLOAT32_EXACT:
        raise ValueError(
            f"identities = {config.identities} with images_per_identity = {config.images_per_identity}: an "
            f"InsightFace dataset counts exactly up to {FLOAT32_EXACT} images and identities together, "
            f"found {config.images + config.identities}; write several sets with other seeds, or stream it "
            "(`lgaf data render`)"
        )


def read_nuisances(path: Path) -> np.ndarray:
    """Read the nuisances of every image of a set, one row per image in order, with named columns.

    `key` is the record's key in train.rec, or the image's number in held_out.bin; `identity` and `number`
    are the arguments of its rendering; the other columns are those of `Nuisances`.

    Raises ValueError, which names the file, if it has other columns.
    """
    with open(path, encoding="utf-8") as file:
        header = file.readline().split()
        if header != list(_COLUMNS.names or ()):
            raise ValueError(
                f"{path}: expected the columns {' '.join(_COLUMNS.names or ())}, found {header}; "
                "write the set again"
            )
        return np.loadtxt(file, _COLUMNS, delimiter="\t", ndmin=1)


def _write_training(folder: Path, config: SynthConfig, stream: Iterable[SynthImage]) -> None:
    with (
        InsightFaceWriter(folder, size=config.image_size) as writer,
        open(folder / TRAIN_NUISANCES, "w", encoding="utf-8") as table,
    ):
        rows = _Table(table)
        for key, image in enumerate(stream, 1):
            label = float(image.identity)
            writer.add(image.jpeg, label if image.number % 2 == 0 else (label, 1.0))
            rows.add(key, image)


def _write_pairs(folder: Path, config: SynthConfig, stream: Iterable[SynthImage]) -> None:
    images = []
    with open(folder / PAIRS_NUISANCES, "w", encoding="utf-8") as table:
        rows = _Table(table)
        for number, image in enumerate(stream):
            images.append(image.jpeg)
            rows.add(number, image)
    write_pairs(folder / PAIRS_FILE, images, pairs_of(config).issame_P.tolist())


class _Table:
    """Writer of the table that `read_nuisances` reads."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        self._writer.writerow(_COLUMNS.names or ())

    def add(self, key: int, image: SynthImage) -> None:
        values = (f"{value:.5g}" if isinstance(value, float) else value for value in image.nuisances)
        self._writer.writerow((key, image.identity, image.number, *values))


def rendered_images(config: SynthConfig, progress: Callable[[int, int], None]) -> Generator[SynthImage]:
    """Yield all images of the set in order: the training images, then those of the pairs."""
    total, done = config.images + 2 * config.pairs, 0
    arguments = ((config, *chunk) for chunk in _chunks(config))
    with contextlib.closing(in_order(render_images, arguments, config.processes)) as results:
        for result in results:
            for image in result:
                yield image
                done += 1
            progress(done, total)


def _chunks(config: SynthConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield identities and numbers of all images, a few at a time."""
    for start in range(0, config.images, AT_ONCE):
        image_N = np.arange(start, min(start + AT_ONCE, config.images))
        yield image_N // config.images_per_identity, image_N % config.images_per_identity
    pairs = pairs_of(config)
    for start in range(0, 2 * config.pairs, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        yield pairs.identity_2P[part], pairs.number_2P[part]


def _content_settings(config: SynthConfig) -> dict[str, object]:
    """Return all settings that determine the content of a set."""
    # Earlier versions already call the renderer's version `painter` in synth.json.
    return {"painter": RENDERER_VERSION, **config.model_dump(mode="json", exclude={"processes"})}


def _describe(folder: Path, config: SynthConfig) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    description = {"config": _content_settings(config), "bytes": sizes}
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _holds_the_set(folder: Path, config: SynthConfig) -> bool:
    """Return True if the folder already holds the set. Raises ValueError if it has other content."""
    if not folder.exists():
        return False
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    if not names:
        return False
    expected = f"{folder}: expected a new or empty folder, or the requested set"
    todo = "choose another folder, or remove this one"
    description = _description(folder)
    if description is None:
        raise ValueError(f"{expected}; found other content ({', '.join(names[:5])}); {todo}")
    has, wanted = description["config"], _content_settings(config)
    differing = [
        f"{k} = {has.get(k)}, requested {wanted.get(k)}" for k in has | wanted if has.get(k) != wanted.get(k)
    ]
    if differing:
        raise ValueError(f"{expected}; found a set with {'; '.join(differing)}; {todo}")
    for name, size in description["bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            text = "no such file" if found is None else found
            raise ValueError(f"{folder / name}: expected {size} bytes, found {text}; {todo}")
    return True


def _description(folder: Path) -> dict[str, dict[str, object]] | None:
    """Read the description of the set in a folder; None if there is none."""
    try:
        description = bounded_json.read(folder / _DESCRIPTION, _LARGEST_DESCRIPTION)
    except (OSError, ValueError):
        return None
    match description:
        case {"config": dict(), "bytes": dict()}:
            return description
    return None
