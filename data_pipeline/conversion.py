"""A RecordIO folder becomes a folder of tar shards, or the reverse; the images stay byte for byte.

To shards: sample by sample in the order of the records. A shard appears when it is whole; where some are
there, from a conversion that was killed, they are compared with the records and the next ones are written, so
that the end is the same as without the interruption. To records: shard by shard, into a hidden folder that
gets its name at the end; what a killed conversion left there is thrown away.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.catalog import Catalog, open_catalog
from data_pipeline.images import decoded
from data_pipeline.insightface import FlatWriter
from data_pipeline.staging import locked, naming_full_disks, staged
from data_pipeline.tarshards import ShardIndex, ShardWriter, index_shard, shard_name

Progress = Callable[[int, int], None]

# There until all shards are: the finished ones of a killed conversion look like a whole dataset.
_UNFINISHED = "unfinished.part"


def convert(
    source: Path, out: Path, *, shard_samples: int = 10_000, progress: Progress | None = None
) -> tuple[int, int]:
    """Convert what `source` holds, train.rec or shards, to the other; the images, and those there before.

    Raises ValueError (DatasetError, ShardError, ...) naming the file if the source is not readable, or if
    `out` holds anything but the beginning of this conversion; OSError if the disk is full.
    """
    if (source / "train.rec").is_file():
        return _to_shards(open_catalog(source), out, shard_samples, progress)
    return _to_records(source, _shards_of(source), out, progress), 0


def _to_shards(catalog: Catalog, out: Path, samples: int, progress: Progress | None) -> tuple[int, int]:
    with locked(out), naming_full_disks(out):
        there, first = _finished(catalog, out)
        (out / _UNFINISHED).touch()
        with ShardWriter(out, samples=samples, first_shard=there, first_sample=first) as writer:
            for record in range(first, len(catalog)):
                writer.add(catalog.image(record).tobytes(), int(catalog.label_N[record]))
                if progress is not None:
                    progress(record + 1, len(catalog))
        (out / _UNFINISHED).unlink()
    return len(catalog), first


def _finished(catalog: Catalog, out: Path) -> tuple[int, int]:
    """How many shards of this conversion are there, and how many samples they hold."""
    names = {path.name for path in out.iterdir() if path.suffix != ".part" and path.name[0] != "."}
    first = 0
    for number in range(len(names)):
        path = out / shard_name(number)
        if path.name not in names:
            raise ValueError(
                f"{out}: expected a new folder, or the first shards of this conversion; found "
                f"{', '.join(sorted(names)[:5])}, but no {path.name}; choose another folder"
            )
        index = index_shard(path)
        if not _is_of(catalog, first, path, index):
            raise ValueError(
                f"{path}: expected samples {first} to {first + len(index.label_N) - 1} of "
                f"{catalog.datasets[0].folder}, found others: it comes from another dataset; choose another "
                "folder, or remove it"
            )
        first += len(index.label_N)
    return len(names), first


def _is_of(catalog: Catalog, first: int, path: Path, index: ShardIndex) -> bool:
    """Whether a shard has the labels of the records from `first` on, and their first and last image."""
    count = len(index.label_N)
    if count == 0 or not np.array_equal(catalog.label_N[first : first + count], index.label_N):
        return False
    data = np.memmap(path, np.uint8, "r")
    return all(
        np.array_equal(data[index.offset_N[i] :][: index.length_N[i]], catalog.image(first + i))
        for i in (0, count - 1)
    )


def _shards_of(source: Path) -> list[Path]:
    names = sorted(source.iterdir()) if source.is_dir() else []
    unfinished = [path for path in names if path.suffix == ".part"]
    if unfinished:
        raise ValueError(
            f"{unfinished[0]}: {source} is not complete; finish its conversion, or remove this file if "
            "none is running"
        )
    # Compressed ones as well: left out silently they would be missing.
    shards = [path for path in names if ".tar" in path.suffixes or path.suffix == ".tgz"]
    if not shards:
        raise ValueError(f"{source}: expected train.rec, or *.tar, found neither; correct the path")
    return shards


def _to_records(source: Path, shards: list[Path], out: Path, progress: Progress | None) -> int:
    indices = [index_shard(path) for path in shards]
    total, done = sum(len(index.label_N) for index in indices), 0
    if not total:
        raise ValueError(f"{source}: none of its {len(shards)} shards holds a sample")
    with staged(out) as partial, FlatWriter(partial, image_size=_first_size(shards, indices)) as writer:
        for path, index in zip(shards, indices, strict=True):
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for start, length, label in zip(*map(np.ndarray.tolist, index), strict=True):
                    writer.add(data[start : start + length], label)
                    done += 1
                    if progress is not None:
                        progress(done, total)
    return total


def _first_size(shards: list[Path], indices: list[ShardIndex]) -> tuple[int, int]:
    """Height and width of the first image, which `property` says of all."""
    path, index = next((p, i) for p, i in zip(shards, indices, strict=True) if len(i.label_N))
    encoded = np.memmap(path, np.uint8, "r")[index.offset_N[0] :][: index.length_N[0]]
    width, height = decoded(encoded, f"{path}: the image at byte {index.offset_N[0]}").size
    return height, width
