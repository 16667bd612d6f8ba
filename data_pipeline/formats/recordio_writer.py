"""Writers of RecordIO datasets, in InsightFace's layout and in im2rec's.

InsightFace's layout has images sorted by identity, and index records of each identity's first and last image:

    keys 1..N             the images, identity after identity
    key 0                 labels [N+1, N+1+C], no image: the keys of the identity records
    keys N+1..N+C         labels [first, last+1], no image: the keys of one identity's images

im2rec's layout, in which the large sets are published, has the images in any order under the keys 0..N-1, and
no other records. In both, `train.rec` holds the records, `train.idx` their offsets, and `property` the line
"C,height,width".
"""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from data_pipeline.common.atomic_write import private_file, write_through
from data_pipeline.formats.container import LARGEST_LABEL
from data_pipeline.formats.int64_labels import write_labels
from data_pipeline.formats.recordio import FLOAT32_EXACT, RecordWriter, pack


class _DatasetWriter:
    """Base of both writers: the files of the dataset get their names only when all of them are complete.

    A writer is a context manager: an exception inside it removes the new files and leaves earlier files of
    the folder unchanged.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._records = RecordWriter(folder / "train.rec")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._records.__exit__(kind, error, trace)
            return
        with private_file(self._folder / "property") as partial, self._records:
            classes, height, width = self._complete()
            write_through(partial, f"{classes},{height},{width}\n")

    def _complete(self) -> tuple[int, int, int]:
        """Write the last records and files; return classes, height and width for `property`."""
        raise NotImplementedError

    def _empty(self) -> ValueError:
        return ValueError(f"{self._folder}: a dataset needs at least one image, none was added")


class InsightFaceWriter(_DatasetWriter):
    """Writes one dataset in InsightFace's layout into `folder`. The images are `size` x `size` pixels."""

    def __init__(self, folder: Path, *, size: int) -> None:
        super().__init__(folder)
        self._size = size
        self._first_keys: list[int] = []
        self._next_key = 1

    def add(self, image: bytes, labels: float | tuple[float, ...]) -> None:
        """Append an encoded image under the next key; its class is the label, or the first of several labels.

        Raises ValueError for an empty image, for classes that are not consecutive from 0, and for more images
        and classes than float32 can count exactly.
        """
        identity = labels[0] if isinstance(labels, tuple) else labels
        latest = len(self._first_keys) - 1
        expected = {max(latest, 0), latest + 1}
        if identity not in expected:
            raise ValueError(
                f"image {self._next_key} has class {identity:g}, expected one of {sorted(expected)}: "
                "sort the images by class, and count the classes from 0"
            )
        if not image:
            raise ValueError(
                f"image {self._next_key} of class {identity:g}: expected an encoded image, found no bytes"
            )
        # The index records store keys as float32 labels, which bounds N + 1 + C.
        if self._next_key + 1 + int(identity) + 1 > FLOAT32_EXACT:
            raise ValueError(
                f"image {self._next_key} of class {identity:g}: expected at most {FLOAT32_EXACT} images and "
                "identities together, because the index records of an InsightFace dataset are float32; write "
                "several datasets"
            )
        if identity > latest:
            self._first_keys.append(self._next_key)
        self._records.write(self._next_key, pack(labels, self._next_key, image))
        self._next_key += 1

    def _complete(self) -> tuple[int, int, int]:
        """Write the index records: key 0 and the identities."""
        if not self._first_keys:
            raise self._empty()
        end, ends = self._next_key, [*self._first_keys[1:], self._next_key]
        self._records.write(0, pack((end, end + len(ends)), 0, b""))
        for key, span in enumerate(zip(self._first_keys, ends, strict=True), end):
            self._records.write(key, pack(span, key, b""))
        return len(ends), self._size, self._size


class FlatWriter(_DatasetWriter):
    """Writes a dataset in im2rec's layout into `folder`; `image_size` is (height, width) in pixels."""

    def __init__(self, folder: Path, *, image_size: tuple[int, int]) -> None:
        super().__init__(folder)
        self._image_size = image_size
        self._labels = array("q")

    def add(self, image: bytes, label: int) -> None:
        """Append an encoded image. Raises ValueError if it is empty, or its label not in [0, 2^63 - 2]."""
        if not image or not 0 <= label <= LARGEST_LABEL:
            raise ValueError(
                f"image {len(self._labels)}: expected an image and a label from 0 to {LARGEST_LABEL}, "
                f"found {len(image)} bytes and label {label}"
            )
        # float32 does not hold larger labels. No reader accepts NaN as a class; the sidecar has all labels.
        key = len(self._labels)
        self._records.write(key, pack(float(label) if label <= FLOAT32_EXACT else math.nan, key, image))
        self._labels.append(label)

    def _complete(self) -> tuple[int, int, int]:
        """Write the labels file if a label exceeds float32, before the records get their names."""
        if not self._labels:
            raise self._empty()
        label_N = np.frombuffer(self._labels, np.int64)
        if label_N.max() > FLOAT32_EXACT:
            write_labels(self._folder / "train.rec", np.arange(len(label_N)), label_N)
        return int(label_N.max()) + 1, *self._image_size
