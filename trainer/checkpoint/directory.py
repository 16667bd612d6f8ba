"""Checkpoints as files: what one holds, whether it is whole, how it appears and when it goes. Without torch.

    run_dir/checkpoints/step-00001000/
        rank-0.bin, ...         the bytes of tensors, a file for each rank that wrote (checkpoint_storage.py)
        checkpoint.json         the manifest: step, configuration, dataset, versions; name, dtype, shape and
                                chunks of every tensor; size and CRC-32 of every other file, and of itself.
                                Written last

What is being written or removed has a name that begins with a dot. A folder gets the name step-N by one
rename, after all that it holds has reached the disk; it loses it by one rename before anything in it goes.
So a process can be killed at any instant, and what step-N holds is whole unless the disk damaged it later;
the manifest tells. CRC-32 is against damage, not against attack.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.common.atomic_write import write_through
from trainer.checkpoint.checksummed_file import FileSum

MANIFEST = "checkpoint.json"
# 1, which no manifest names, has its tensors described by a pickle of torch's: see checkpoint_convert.py.
FORMAT = 2
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_NAME = re.compile(r"step-(\d+)")
_PLAIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or cannot be written; says which and why."""


@dataclass(frozen=True)
class Header:
    """What is known of a checkpoint without reading a tensor."""

    step: int
    config: dict[str, Any]
    dataset: dict[str, int]
    versions: dict[str, str]
    cursor: list[list[int]] | None = None  # of a stream of shards, a row for each rank


@dataclass(frozen=True)
class Chunk:
    """`rows` rows of a tensor from row `start` on: `length` bytes of a file from `offset` on.

    The bytes are the elements in row-major order, little-endian. A tensor without dimensions is one row.
    """

    start: int
    rows: int
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint: its dtype as torch names it, its shape, its chunks from the first row on."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def row_bytes(self) -> int:
        """The size of one row in bytes."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape[1:])

    @property
    def rows(self) -> int:
        """The number of rows; 1 for a tensor without dimensions."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint: header, time of writing, sums of all other files, tensors by name.

    `time_s` counts seconds since 1970. In format 1 `tensors` is empty: a pickle describes them.
    """

    header: Header
    time_s: float
    files: dict[str, FileSum]
    tensors: dict[str, StoredTensor]
    format: int = FORMAT


class IntegrityCheck(Protocol):
    """Looks at one part of `parts` of a checkpoint's files; returns what is wrong, None if nothing is."""

    def __call__(self, checkpoint: Path, part: int = 0, parts: int = 1) -> str | None: ...


def folder_of(run_dir: Path) -> Path:
    """Where a run has its checkpoints."""
    return run_dir / "checkpoints"


def final_path(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return folder_of(run_dir) / f"step-{step:08d}"


def partial_path(final: Path) -> Path:
    """What a checkpoint is called while it is written or removed."""
    return final.with_name(f".{final.name}.part")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def all_of(run_dir: Path) -> list[Path]:
    """All checkpoints of a run by step, oldest first, whole or not."""
    found = (path for path in folder_of(run_dir).glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant as a checkpoint, whole or not, and not as a run directory."""
    return (path / MANIFEST).exists() or (_NAME.fullmatch(path.name) is not None and path.is_dir())


def begin(final: Path) -> Path:
    """Make an empty folder for the files of the checkpoint that will be called `final`."""
    partial = partial_path(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(
    partial: Path,
    final: Path,
    header: Header,
    files: dict[str, FileSum],
    tensors: dict[str, StoredTensor],
) -> None:
    """Give the name `final` to the files in `partial`, which are on the disk already, with a manifest.

    A checkpoint that has the name goes, but not before: a kill between the two renames is mended by `clean`.
    """
    manifest = Manifest(header, time.time(), files, tensors)
    _check(manifest)
    write_through(partial / MANIFEST, _sealed(manifest))
    _sync_folder(partial)
    before = final.with_name(f".{final.name}.old")
    if final.exists():
        os.replace(final, before)
    os.replace(partial, final)
    _sync_folder(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def clean(run_dir: Path) -> None:
    """Remove what killed or failed saves have left; a save that is being written is given up."""
    with contextlib.suppress(OSError):  # a file system that is gone; the next save says so
        for path in folder_of(run_dir).glob(".step-*.old"):
            final = path.with_name(path.name[1:].removesuffix(".old"))
            if not final.exists():
                os.replace(path, final)
        for gone in folder_of(run_dir).glob(".step-*.gone"):
            shutil.rmtree(gone, ignore_errors=True)
        for path in folder_of(run_dir).glob(".step-*"):
            # Renamed first: whoever still writes it cannot publish what is half gone.
            shutil.rmtree(path.rename(path.with_suffix(".gone")), ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no time is there a part of one under its name."""
    doomed = partial_path(checkpoint)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def superfluous(
    run_dir: Path, *, keep: int, every_steps: int | None, look: IntegrityCheck, until_step: int | None = None
) -> list[Path]:
    """The checkpoints older than the `keep` newest in which `look` finds nothing wrong.

    Those at multiples of `every_steps` stay. Those after `until_step`, which a run that has gone back may
    have, neither count nor go.
    """
    good, found = 0, []
    for checkpoint in reversed(all_of(run_dir)):
        step = step_of(checkpoint)
        if until_step is not None and step > until_step:
            continue
        if good < keep:
            good += look(checkpoint) is None
        elif every_steps is None or step % every_steps:
            found.append(checkpoint)
    return found


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest. Raises CheckpointError if it is missing, damaged, or of a newer format."""
    path = checkpoint / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text)
        if held.get("format", 1) not in (1, FORMAT):
            raise ValueError(f"format {held['format']!r}, of a newer lgaf")
        manifest = _parsed(held)
        _check(manifest)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint's manifest, found: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint's manifest, found: {error!r}") from error
    if _sealed(manifest) != text:
        raise CheckpointError(f"{path}: expected a checkpoint's manifest, found one that was changed")
    return manifest


def as_json(table: Mapping[str, FileSum | StoredTensor]) -> dict[str, Any]:
    """A table of files or of tensors as plain values, by name."""
    return {name: asdict(entry) for name, entry in sorted(table.items())}


def table_from_json(held: dict[str, Any]) -> dict[str, StoredTensor]:
    """The table of tensors that `as_json` made plain."""
    return {
        name: StoredTensor(
            entry["dtype"], tuple(entry["shape"]), tuple(Chunk(**chunk) for chunk in entry["chunks"])
        )
        for name, entry in held.items()
    }


def _parsed(held: dict[str, Any]) -> Manifest:
    files = {name: FileSum(**entry) for name, entry in held.pop("files").items()}
    tensors = table_from_json(held.pop("tensors", {}))
    form, time_s, _ = held.pop("format", 1), held.pop("time_s"), held.pop("crc32")
    return Manifest(Header(**held), time_s, files, tensors, form)


def _check(manifest: Manifest) -> None:
    """Raise ValueError unless every row of every tensor is described once, by bytes that a file has."""
    for name in manifest.files:
        if name == MANIFEST or not _PLAIN.fullmatch(name) or not name.strip("."):
            raise ValueError(f"the file name {name!r}")
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ITEM_BYTES or not all(map(_is_count, tensor.shape)):
            raise ValueError(f"the tensor {name!r} of dtype {tensor.dtype!r} and shape {tensor.shape!r}")
        row = 0
        for chunk in tensor.chunks:
            if not all(map(_is_count, (chunk.start, chunk.rows, chunk.offset, chunk.length))):
                raise ValueError(f"{chunk!r} of {name!r}")
            if chunk.start != row or chunk.length != chunk.rows * tensor.row_bytes:
                raise ValueError(
                    f"{chunk!r} of {name!r}, expected {tensor.row_bytes} bytes a row from {row} on"
                )
            if chunk.offset + chunk.length > manifest.files[chunk.file].size:
                raise ValueError(f"{chunk!r} of {name!r}, beyond the end of its file")
            row += chunk.rows
        if row != tensor.rows:
            raise ValueError(f"{row} rows of {name!r}, expected {tensor.rows}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def wrong_size(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """A `IntegrityCheck` at the manifest and the files' sizes."""
    return _first_wrong(_wrong_size, checkpoint, part, parts)


def wrong_sum(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """A `IntegrityCheck` at the manifest and every byte of the files."""
    return _first_wrong(_wrong_sum, checkpoint, part, parts)


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """A `IntegrityCheck` at everything, at what is quickly seen first."""
    return wrong_size(checkpoint, part, parts) or wrong_sum(checkpoint, part, parts)


def _first_wrong(
    wrong: Callable[[Path, FileSum], str | None], checkpoint: Path, part: int, parts: int
) -> str | None:
    """What is wrong with the manifest, or with the first file of a part that has something wrong."""
    try:
        files = _share(read_manifest(checkpoint), part, parts)
    except CheckpointError as error:
        return str(error)
    return next((found for name, wanted in files if (found := wrong(checkpoint / name, wanted))), None)


def _wrong_size(path: Path, wanted: FileSum) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: expected a file of {wanted.size} bytes, found: {error.strerror}"
    return None if size == wanted.size else f"{path}: expected {wanted.size} bytes, found {size}"


def _wrong_sum(path: Path, wanted: FileSum) -> str | None:
    try:
        found = FileSum.of(path)
    except OSError as error:
        return f"{path}: expected a file that can be read, found: {error.strerror}"
    return None if found == wanted else f"{path}: expected CRC-32 {wanted.crc32}, found {found.crc32}"


def _share(manifest: Manifest, part: int, parts: int) -> Iterable[tuple[str, FileSum]]:
    """Large files are dealt out before small ones, so that no part is left with several large ones."""
    return sorted(manifest.files.items(), key=lambda item: -item[1].size)[part::parts]


def _sealed(manifest: Manifest) -> str:
    """The text of a manifest; it ends with its own CRC-32, and only this very text is accepted."""
    content = {
        **({} if manifest.format == 1 else {"format": manifest.format}),
        **asdict(manifest.header),
        "time_s": manifest.time_s,
        "files": as_json(manifest.files),
        **({} if manifest.format == 1 else {"tensors": as_json(manifest.tensors)}),
    }
    crc = zlib.crc32(json.dumps(content).encode())
    return json.dumps({**content, "crc32": f"{crc:08x}"}, indent=1) + "\n"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
