"""A writer of WebDataset shards: uncompressed tar files of numbered samples, each an image and its label."""

from __future__ import annotations

import contextlib
import re
import tarfile
from pathlib import Path
from types import TracebackType
from typing import IO

from data_pipeline.common.atomic_write import close_if_possible, private_file
from data_pipeline.formats.container import LARGEST_LABEL
from data_pipeline.formats.tar_index import BLOCK

_SIGNATURES = {"png": re.compile(rb"\x89PNG\r\n\x1a\n"), "webp": re.compile(rb"RIFF....WEBP", re.DOTALL)}
# Two blocks of zeros end a tar.
END = bytes(2 * BLOCK)


def sample(number: int, image: bytes, label: int) -> bytes:
    """Return the tar members of sample `number`: an encoded image and its label.

    A shard consists of samples and END. The members hold neither a time nor a user.

    Raises ValueError for an empty image or a label that is not in [0, 2^63 - 2].
    """
    if not image or not 0 <= label <= LARGEST_LABEL:
        raise ValueError(
            f"sample {number}: expected an image and a label from 0 to {LARGEST_LABEL}, "
            f"found {len(image)} bytes and label {label}"
        )
    name = f"{number:09d}"
    return _member(f"{name}.{_suffix(image)}", image) + _member(f"{name}.cls", b"%d" % label)


class ShardWriter:
    """Writes samples into `folder` as `train-000000.tar`, `train-000001.tar`, ...

    A shard has at most `samples` samples and, unless it has only one sample, at most `size_bytes` bytes. It
    is written under a temporary name and renamed when it is complete and on disk: a shard under its final
    name is intact. Neither times nor users are stored, so the same samples give the same bytes. The first
    sample gets the number `first_sample`, the first shard the number `first_shard`.

    The writer is a context manager: an exception inside it removes the unfinished shard and keeps the others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        samples: int = 10_000,
        size_bytes: int = 1 << 30,
        first_shard: int = 0,
        first_sample: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._samples, self._size_bytes = samples, size_bytes
        self._shard, self._sample = first_shard, first_sample
        self._held = 0
        self._file: IO[bytes] | None = None
        # Closes the open shard; then names it, or removes it after an exception.
        self._open = contextlib.ExitStack()

    def add(self, image: bytes, label: int) -> None:
        """Append an encoded image and its label.

        Raises ValueError for an empty image or a label that is not in [0, 2^63 - 2].
        """
        members = sample(self._sample, image, label)
        if self._file is not None and (
            self._held == self._samples or self._file.tell() + len(members) + len(END) > self._size_bytes
        ):
            self._finish()
        if self._file is None:
            path = self._open.enter_context(private_file(self._folder / shard_name(self._shard)))
            self._file, self._held = open(path, "wb"), 0
            self._open.callback(close_if_possible, self._file)
        self._file.write(members)
        self._held += 1
        self._sample += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._open.__exit__(kind, error, trace)
        elif self._file is not None:
            with self._open:
                self._finish()

    def _finish(self) -> None:
        assert self._file is not None
        self._file.write(END)
        self._file.flush()
        self._open.close()
        self._file = None
        self._shard += 1


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"train-{number:06d}.tar"


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def _suffix(image: bytes) -> str:
    """Return png or webp for an image with such a signature, else jpg."""
    return next((name for name, signature in _SIGNATURES.items() if signature.match(image)), "jpg")
