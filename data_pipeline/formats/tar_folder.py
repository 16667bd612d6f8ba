"""The container for a folder of WebDataset shards: all of its `.tar` files, in the order of their names.

The key of a record is the number of its sample in the shard.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.formats.container import (
    FILE,
    KEY,
    LENGTH,
    LONGEST,
    DatasetError,
    FileTable,
    Progress,
    RecordError,
    Records,
    file_names,
    joined,
    table_of,
)
from data_pipeline.formats.tar_index import index_shard


def list_files(folder: Path) -> FileTable | None:
    """Return the shards; None if the folder has none.

    Raises DatasetError if a shard is compressed, or if the folder is still being written.
    """
    names = file_names(folder)
    shards = [name for name in names if ".tar" in Path(name).suffixes or name.endswith(".tgz")]
    if not shards:
        return None
    unfinished = [name for name in names if name.endswith(".part")]
    if unfinished:
        raise DatasetError(
            f"{folder / unfinished[0]}: {folder} is not complete; finish its conversion, or remove this file "
            "if no conversion is running"
        )
    # Skipping compressed shards silently would lose their samples.
    packed = [name for name in shards if not name.endswith(".tar")]
    if packed:
        raise DatasetError(
            f"{folder / packed[0]}: expected uncompressed shards (*.tar), because images are read as byte "
            f"ranges, found {len(packed)} compressed ones; decompress them"
        )
    return table_of(folder, shards)


def read_records(files: FileTable, progress: Progress) -> Records:
    """Read the samples of all shards. Raises ShardError, which names shard and offset."""
    parts, done, total = [], 0, int(files.size_F.sum())
    for number in range(len(files)):
        index = index_shard(files.path(number))
        count = len(index.label_N)
        parts.append(
            Records(
                np.full(count, number, FILE),
                index.offset_N,
                np.minimum(index.length_N, LONGEST).astype(LENGTH),
                index.label_N,
                np.arange(count, dtype=KEY),
                np.flatnonzero(index.length_N > LONGEST),
            )
        )
        done += int(files.size_F[number])
        progress(done, total)
    records = joined(parts)
    if not len(records.label_N):
        raise DatasetError(
            f"{files.folder}: expected samples, found none in its {len(files)} shards; copy it again"
        )
    return records


def image_of(span: bytes, where: str, offset: int) -> np.ndarray:
    """Return the image's bytes, uint8. Raises RecordError if it is too long for an image."""
    if len(span) >= LONGEST:
        raise RecordError(f"{where}: expected an image, found a file of {LONGEST} bytes or more")
    return np.frombuffer(span, np.uint8)
