"""The catalog of a dataset: arrays with the position and the label of every image.

catalog = open_catalog(folder)            or several: the classes of each follow those of the one before
catalog.label_N[i], catalog.image(i)

files     find the folder's container (`CONTAINERS`), and list names, sizes and times of its files
arrays    take them from the cache if the files are unchanged; else one process of a node reads the
          files once and writes the cache, while the others wait
checks    compare the classes with `property` and the configuration, which can change without the files
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.data_file import lines_of
from data_pipeline.common.progress_bar import progress_bar
from data_pipeline.formats import image_folder, recordio_folder, tar_folder
from data_pipeline.formats.container import (
    COLUMNS,
    FILE,
    LARGEST_LABEL,
    Container,
    DatasetError,
    FileTable,
    RecordError,
    Records,
)
from data_pipeline.indexed import catalog_cache
from data_pipeline.indexed.byte_ranges import ByteRanges
from data_pipeline.quarantine import BadRecord

__all__ = ["Catalog", "DatasetError", "RecordError", "open_catalog", "read_property"]

# In the order in which a folder is tested. Images come last, because any sub-folder may contain some.
CONTAINERS: dict[str, Container] = {
    "recordio": recordio_folder,
    "tar": tar_folder,
    "images": image_folder,
}

_FORMAT = 1
_HIDDEN = ".lgaf_catalog"
# A dataset with more damaged records than this number or this share, whichever is more, is refused; below
# that the loaders replace them (see quarantine.py).
_MOST_DAMAGED, _DAMAGED_SHARE = 10, 0.01
_NAMED = 10
_PROPERTY_CHARS = 4096
# The largest image that training decodes has less, also if it is not compressed.
_LARGEST_RECORD = 1 << 28


class Dataset(NamedTuple):
    """One folder: its container's name in CONTAINERS, and its files."""

    container: str
    files: FileTable

    @property
    def folder(self) -> Path:
        """The path of the folder."""
        return self.files.folder


class Catalog:
    """The N images of a dataset, or of several; K of them are damaged.

    `file_N` and `length_N` (bytes) are int32, `offset_N`, `label_N` and `key_N` int64, labels are in
    [0, num_classes); `damaged_K` are the numbers of the records that cannot be read, ascending int64. A
    damaged record stays in the catalog, and its `image` raises RecordError.
    """

    def __init__(
        self, datasets: Sequence[Dataset], records: Records, num_classes: int, labels_crc32: int
    ) -> None:
        self.datasets, self.num_classes = tuple(datasets), num_classes
        self.label_N, self.key_N, self.damaged_K = records.label_N, records.key_N, records.damaged_K
        self.file_N, self.offset_N, self.length_N = records.file_N, records.offset_N, records.length_N
        self._labels_crc32 = labels_crc32
        self._bytes = ByteRanges([dataset.files for dataset in datasets])
        self._first_file = [0, *accumulate(len(dataset.files) for dataset in datasets)]
        self._containers = [CONTAINERS[dataset.container] for dataset in datasets]

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def fingerprint(self) -> dict[str, int]:
        """Numbers of images and classes, and a checksum of the labels: a resumed run compares them."""
        return {"images": len(self), "classes": self.num_classes, "labels_crc32": self._labels_crc32}

    def image(self, record: int) -> np.ndarray:
        """Return the encoded image of one record, uint8.

        Raises RecordError, which names file, key, offset and reason, if the record is damaged, and
        DatasetError if its file has changed or is missing.
        """
        file, offset = int(self.file_N[record]), int(self.offset_N[record])
        length = int(self.length_N[record])
        if length > _LARGEST_RECORD:
            raise RecordError(
                f"{self.name_of(record)}: expected an image, found a record of {length} bytes, more than "
                f"{_LARGEST_RECORD}"
            )
        span = self._bytes.read(file, offset, length)
        container = self._containers[0 if len(self._containers) == 1 else self._dataset_of(file)]
        try:
            return container.image_of(span, "", offset)
        except RecordError as error:
            raise RecordError(f"{self.name_of(record)}{error}") from error

    def damage(self, count: int) -> list[str]:
        """Return the error messages of the first `count` damaged records."""
        reasons = []
        for record in self.damaged_K[:count].tolist():
            try:
                self.image(record)
            except RecordError as error:
                reasons.append(str(error))
        return reasons

    def name_of(self, record: int) -> str:
        """Return the name of a record for messages: file, key and offset."""
        where = self._bytes.name(int(self.file_N[record]))
        return f"{where}: key {self.key_N[record]} at byte {self.offset_N[record]}"

    def bad(self, record: int, reason: str) -> BadRecord:
        """Return the record's position for the quarantine's list; `reason` may begin with its name."""
        return BadRecord(
            self._bytes.name(int(self.file_N[record])),
            int(self.key_N[record]),
            int(self.offset_N[record]),
            reason.removeprefix(self.name_of(record)).lstrip(": "),
        )

    def _dataset_of(self, file: int) -> int:
        return int(np.searchsorted(self._first_file, file, side="right")) - 1


def open_catalog(
    path: Path | Sequence[Path], num_classes: int | None = None, catalog_dir: Path | None = None
) -> Catalog:
    """Open the catalog of the dataset in a folder, or of several datasets with consecutive classes.

    `num_classes` overrides the number in `property`. `catalog_dir` is the folder for catalogs, by default a
    hidden folder of the (first) dataset, or the user's cache if the dataset's folder is read-only. The arrays
    are memory-mapped, and the processes of a node share one copy. Their values are checked first, which takes
    about a second for 42 million images. A catalog that another user has written is used only if the datasets
    belong to this user or if it is root's; otherwise this user builds one.

    Raises DatasetError or RecordError if files are missing, do not match each other, are truncated, have
    another format or labels outside the classes, or if more than 10 records and more than 1 % of them are
    damaged.
    """
    folders = [path] if isinstance(path, Path) else list(path)
    datasets = [_dataset_in(folder) for folder in folders]
    arrays, facts = catalog_cache.open_or_build(
        _places(folders[0], catalog_dir),
        _cache_name(folders),
        _signature(datasets),
        lambda: _build(datasets),
        catalog_cache.Trust(_trusted_owners(folders), partial(_is_catalog_of, datasets)),
    )
    catalog = Catalog(datasets, Records(**arrays), facts["classes"], facts["labels_crc32"])
    _check_classes(catalog, facts["largest"], num_classes)
    catalog.num_classes = num_classes or catalog.num_classes
    return catalog


def read_property(folder: Path) -> tuple[int, int, int] | None:
    """Return (classes, height, width) from the folder's `property` file, None if there is no such file.

    Raises DatasetError if its first line is not three whole numbers.
    """
    path = folder / "property"
    if path.is_dir():  # of an identity with this name
        return None
    try:
        line = next(lines_of(path, _PROPERTY_CHARS, "utf-8", "replace"), "")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(f"{path}: expected 'classes,height,width', found: {error.strerror}") from error
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 3 or not all(field.isdecimal() and len(field) < 10 for field in fields):
        raise DatasetError(
            f"{path}: first line is {line.rstrip()[:60]!r}, expected 'classes,height,width' in whole "
            "numbers; correct it"
        )
    return int(fields[0]), int(fields[1]), int(fields[2])


def _dataset_in(folder: Path) -> Dataset:
    for name, container in CONTAINERS.items():
        files = container.list_files(folder)
        if files is not None:
            return Dataset(name, files)
    raise DatasetError(
        f"no dataset at {folder}: expected {folder}/train.rec, other .rec files, .tar shards, or a "
        f"sub-folder of images for each identity, found {_contents(folder)}; name such a "
        "folder, in data.path for a training, or write one with `lgaf data synth` or `lgaf data pack`"
    )


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing in it"


def _places(folder: Path, catalog_dir: Path | None) -> list[Path]:
    """Return the places for catalogs of a folder, best first; a shared place has a sub-folder per dataset."""
    where = folder.resolve()
    own = f"{where.name}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:8]}"
    if catalog_dir is not None:
        return [catalog_dir / own, catalog_dir / f"{own}-user-{os.geteuid()}"]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [folder / _HIDDEN, user_cache / "lgaf" / own]


def _trusted_owners(folders: Sequence[Path]) -> frozenset[int]:
    """Return the users whose catalogs are used: this one, root, and the owner of the datasets themselves."""
    owners = {folder.stat().st_uid for folder in folders}
    return frozenset({os.geteuid(), 0} | (owners if len(owners) == 1 else set()))


def _is_catalog_of(datasets: Sequence[Dataset], arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bool:
    """Return True if all values of a cached catalog are in their ranges, and its labels have their checksum.

    Reads all columns but one, about a second for 42 million images; the pages stay in the system's cache.
    """
    records, label_N = Records(**arrays), arrays["label_N"]
    total, largest = len(label_N), facts["largest"]
    if total == 0 or any(len(column) != total for column in records[:-1]):
        return False
    if len(largest) != len(datasets) or not all(type(at) is int and 0 <= at < total for at in largest):
        return False
    return bool(
        type(facts["classes"]) is int
        and zlib.crc32(label_N.data) == facts["labels_crc32"]
        and label_N.min() >= 0
        and label_N.max() == label_N[largest[-1]] == facts["classes"] - 1
        and records.file_N.min() >= 0
        and records.file_N.max() < sum(len(dataset.files) for dataset in datasets)
        and records.offset_N.min() >= 0
        and records.length_N.min() >= 0
        and all(0 <= at < total for at in [*records.damaged_K[:1], *records.damaged_K[-1:]])
        and (records.damaged_K[1:] > records.damaged_K[:-1]).all()
    )


def _cache_name(folders: Sequence[Path]) -> str:
    """Return a name that depends on the folders' relative paths, not on their mount point."""
    others = [os.path.relpath(folder, folders[0]) for folder in folders[1:]]
    return f"union-{hashlib.sha256(os.fsencode(str(others))).hexdigest()[:8]}" if others else "catalog"


def _signature(datasets: Sequence[Dataset]) -> str:
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for container, files in datasets:
        digest.update(container.encode() + files.signature())
    return digest.hexdigest()


def _build(datasets: Sequence[Dataset]) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]]:
    """Return the columns of all datasets, one piece per dataset, and the facts to store with them."""
    parts: list[Records] = []
    files = classes = records = labels_crc32 = 0
    largest: list[int] = []
    for dataset in datasets:
        with progress_bar(f"reading {dataset.folder}", counts_bytes=True) as progress:
            part = CONTAINERS[dataset.container].read_records(dataset.files, progress)
        _refuse_damage(dataset, part)
        _refuse_changed(dataset)
        at = int(np.argmax(part.label_N))
        largest.append(records + at)
        if classes + int(part.label_N[at]) > LARGEST_LABEL:
            raise DatasetError(
                f"{dataset.folder}: label {part.label_N[at]} after {classes} classes of other datasets: "
                f"expected a sum of at most {LARGEST_LABEL}; number the classes of each dataset from 0"
            )
        shifted = part._replace(
            file_N=(part.file_N + files).astype(FILE, copy=False),
            label_N=part.label_N + classes,
            damaged_K=part.damaged_K + records,
        )
        files, records, classes = (
            files + len(dataset.files),
            records + len(part.label_N),
            int(shifted.label_N[at]) + 1,
        )
        labels_crc32 = zlib.crc32(shifted.label_N.data, labels_crc32)
        parts.append(shifted)
    columns = {
        name: [piece.astype(dtype, copy=False) for piece in pieces]
        for (name, dtype), pieces in zip(COLUMNS.items(), zip(*parts, strict=True), strict=True)
    }
    return columns, {"classes": classes, "labels_crc32": labels_crc32, "largest": largest}


def _refuse_damage(dataset: Dataset, records: Records) -> None:
    damaged, total = len(records.damaged_K), len(records.label_N)
    if damaged <= max(_MOST_DAMAGED, _DAMAGED_SHARE * total):
        return
    reasons = Catalog([dataset], records, 0, 0).damage(_NAMED)
    raise DatasetError(
        f"{dataset.folder}: {damaged} of {total} records are damaged, more than {_DAMAGED_SHARE:.0%}; copy "
        "it again. The first ones:\n" + "\n".join(reasons)
    )


def _refuse_changed(dataset: Dataset) -> None:
    now = CONTAINERS[dataset.container].list_files(dataset.folder)
    if now is None or now.signature() != dataset.files.signature():
        raise DatasetError(
            f"{dataset.folder} has changed while its catalog was being made; restart when it is complete"
        )


def _check_classes(catalog: Catalog, largest: Sequence[int], num_classes: int | None) -> None:
    """Raise DatasetError if a label is outside the classes; `largest` holds, for each dataset,
    the number of the record with the largest label."""
    if num_classes is not None:
        label = catalog.label_N[largest[-1]]
        if label >= num_classes:
            raise DatasetError(
                f"{catalog.name_of(largest[-1])} has label {label}, outside the {num_classes} classes of "
                f"data.num_classes (0 to {num_classes - 1}); set it to at least {label + 1}"
            )
        return
    before = 0
    for dataset, record in zip(catalog.datasets, largest, strict=True):
        label = int(catalog.label_N[record]) - before
        found = read_property(dataset.folder)
        if found is not None and found[0] != label + 1:
            raise DatasetError(
                f"{dataset.folder / 'property'} gives {found[0]} classes, but {catalog.name_of(record)} has "
                f"label {label}, the largest, so there are {label + 1}; correct `property`, or set "
                "data.num_classes"
            )
        before += label + 1
