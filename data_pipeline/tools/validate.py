"""Validation of a dataset: every record is read and decoded, to find bad records before training.

Several processes take pieces of the records in turn; each process opens the catalog, which exists by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.image_header import SIDES_PX, wrong_size
from data_pipeline.common.pillow_decode import DecodeError, decoded, kind
from data_pipeline.common.process_pool import CRASHES, WorkerDiedError, first_crashing, in_order
from data_pipeline.formats.container import Progress, RecordError
from data_pipeline.indexed.catalog import Catalog, open_catalog
from data_pipeline.quarantine import BadRecord

_AT_ONCE = 1000


class Report(NamedTuple):
    """Result of a validation: the count of each kind of image ("JPEG 112x112 RGB"), and the bad records."""

    kinds: Counter[str]
    bad: list[BadRecord]


def validate(
    folders: Sequence[Path],
    catalog_dir: Path | None,
    progress: Progress,
    processes: int | None = None,
    max_side: int = SIDES_PX[1],
) -> Report:
    """Read and decode all records; an image with a side above `max_side` pixels is bad.

    Raises DatasetError or RecordError if the dataset cannot be opened, ValueError, with the record's name, if
    an image crashes its decoder.
    """
    catalog = open_catalog(folders, catalog_dir=catalog_dir)
    total = len(catalog)
    pieces = [(start, min(start + _AT_ONCE, total)) for start in range(0, total, _AT_ONCE)]
    calls = ((tuple(folders), catalog_dir, max_side, start, stop) for start, stop in pieces)
    kinds: Counter[str] = Counter()
    bad: list[BadRecord] = []
    try:
        for (_, stop), part in zip(pieces, in_order(_piece, calls, processes), strict=True):
            kinds += part.kinds
            bad += part.bad
            progress(stop, total)
    except WorkerDiedError as error:
        *same, start, stop = error.arguments
        crashing = first_crashing(_piece, ((*same, i, i + 1) for i in range(start, stop)))
        if crashing is None:
            raise
        raise ValueError(f"{catalog.name_of(crashing[-1] - 1)}: {CRASHES}; remove it") from error
    return Report(kinds, bad)


@lru_cache(maxsize=1)
def _catalog(folders: tuple[Path, ...], catalog_dir: Path | None) -> Catalog:
    return open_catalog(folders, catalog_dir=catalog_dir)


def _piece(
    folders: tuple[Path, ...], catalog_dir: Path | None, max_side: int, start: int, stop: int
) -> Report:
    catalog, report = _catalog(folders, catalog_dir), Report(Counter(), [])
    for record in range(start, stop):
        reason: str | None
        try:
            image = decoded(catalog.image(record), "", max_side=max_side)
            reason = wrong_size(*image.size, high=max_side)
        except RecordError as error:
            reason = str(error)
        except DecodeError as error:
            reason = error.reason
        if reason is None:
            report.kinds[kind(image)] += 1
        else:
            report.bad.append(catalog.bad(record, reason))
    return report
