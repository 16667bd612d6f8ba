"""Conversion of a RecordIO folder into a folder of tar shards, or the reverse; image bytes do not change.

A conversion to shards writes the samples in the order of the records, and a shard appears when it is
complete. After an interruption it compares the existing shards with the records and resumes after them; the
result is the same as without the interruption. A conversion to records writes into a hidden folder that is
renamed at the end; it removes the remains of an interrupted conversion and starts from the beginning.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data_pipeline.common.atomic_write import locked, naming_full_disks, open_to_append, staged
from data_pipeline.common.pillow_decode import decoded
from data_pipeline.formats.container import Progress
from data_pipeline.formats.recordio_writer import FlatWriter
from data_pipeline.formats.tar_index import ShardIndex, index_shard
from data_pipeline.formats.tar_writer import ShardWriter, shard_name
from data_pipeline.indexed.catalog import Catalog, open_catalog

# This file exists until all shards do: the shards of an interrupted conversion look like a complete dataset.
_UNFINISHED = "unfinished.part"


def convert(
    source: Path, out: Path, *, shard_samples: int = 10_000, progress: Progress | None = None
) -> tuple[int, int]:
    """Convert `source` from train.rec to shards or the reverse.

    Returns the number of images in all, and of those that an interrupted conversion had already written.

    Raises ValueError (DatasetError, ShardError, ...), which names the file, if the source is not readable, or
    if `out` holds anything but the first shards of this conversion; OSError if the disk is full.
    """
    catalog = open_catalog(source)
    if catalog.datasets[0].container == "tar":
        return _to_records(catalog, out, progress), 0
    return _to_shards(catalog, out, shard_samples, progress)


def _to_shards(catalog: Catalog, out: Path, samples: int, progress: Progress | None) -> tuple[int, int]:
    with locked(out), naming_full_disks(out):
        there, first = _finished(catalog, out)
        os.close(open_to_append(out / _UNFINISHED))
        with ShardWriter(out, samples=samples, first_shard=there, first_sample=first) as writer:
            for record in range(first, len(catalog)):
                writer.add(catalog.image(record).tobytes(), int(catalog.label_N[record]))
                if progress is not None:
                    progress(record + 1, len(catalog))
        (out / _UNFINISHED).unlink()
    return len(catalog), first


def _finished(catalog: Catalog, out: Path) -> tuple[int, int]:
    """Return how many shards of this conversion exist, and how many samples they hold."""
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
                f"{path}: expected {len(index.label_N)} samples that follow the first {first} of "
                f"{len(catalog)}, found other samples: it comes from another dataset; choose another "
                "folder, or remove it"
            )
        first += len(index.label_N)
    return len(names), first


def _is_of(catalog: Catalog, first: int, path: Path, index: ShardIndex) -> bool:
    """Return True if a shard has the labels of the records from `first`, and their first and last image."""
    count = len(index.label_N)
    if count == 0 or not np.array_equal(catalog.label_N[first : first + count], index.label_N):
        return False
    data = np.memmap(path, np.uint8, "r")
    return all(
        np.array_equal(data[index.offset_N[i] :][: index.length_N[i]], catalog.image(first + i))
        for i in (0, count - 1)
    )


def _to_records(catalog: Catalog, out: Path, progress: Progress | None) -> int:
    # `property` states one size for all images.
    width, height = decoded(catalog.image(0), catalog.name_of(0)).size
    with staged(out) as partial, FlatWriter(partial, image_size=(height, width)) as writer:
        for record in range(len(catalog)):
            writer.add(catalog.image(record).tobytes(), int(catalog.label_N[record]))
            if progress is not None:
                progress(record + 1, len(catalog))
    return len(catalog)
