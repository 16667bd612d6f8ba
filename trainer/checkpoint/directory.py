"""Checkpoints as files: their contents, verification, publication and removal. Does not import torch.

    run_dir/checkpoints/step-00001000/
        rank-0.bin, ...         the bytes of tensors, one file per rank that wrote any (storage.py)
        checkpoint.json         the manifest, written last: step, configuration, dataset, versions; name,
                                dtype, shape and chunks of every tensor; size and CRC-32 of every file

Incomplete folders have names that begin with a dot. A folder is renamed to step-N after all its files have
reached the disk, and is renamed again before any of them is removed. A folder named step-N is therefore
complete even if a process is killed at any time. CRC-32 detects damage, not tampering.
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

from data_pipeline.common import bounded_json
from data_pipeline.common.atomic_write import write_through
from trainer.checkpoint.checksummed_file import FileSum, open_regular

MANIFEST = "checkpoint.json"
# Format 1 has no `format` in its manifest, and describes its tensors in torch's pickle: see convert.py.
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
# A chunk takes about 150 bytes: enough for two hundred thousand. As values, JSON can take 20 times its size.
_LARGEST_MANIFEST = 32 << 20
_YEAR_5000_S = 1e11
_NAME = re.compile(r"step-(\d+)")
_CRC32 = re.compile(r"[0-9a-f]{8}")
_PLAIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or could not be written."""


@dataclass(frozen=True)
class Header:
    """The properties of a checkpoint that are known without reading a tensor."""

    step: int
    config: dict[str, Any]
    dataset: dict[str, int]  # the dataset's fingerprint: images, classes, checksum of the labels
    versions: dict[str, str]
    cursor: list[list[int]] | None = None  # positions in a stream of shards, a row for each rank


@dataclass(frozen=True)
class Chunk:
    """`rows` rows of a tensor, starting at row `start`: `length` bytes of a file, starting at `offset`.

    The bytes are the elements in row-major order, little-endian. A tensor without dimensions is one row.
    """

    start: int
    rows: int
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint: the name of its torch dtype, its shape, its chunks in the order of rows."""

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
    """The manifest of a checkpoint: header, time of writing, checksums of all other files, tensors by name.

    `time_s` is in seconds since 1970. In format 1 `tensors` is empty: a pickle describes them.
    """

    header: Header
    time_s: float
    files: dict[str, FileSum]
    tensors: dict[str, StoredTensor]
    format: int = FORMAT


class IntegrityCheck(Protocol):
    """Function that checks part `part` of `parts` of the files and returns the first problem, or None."""

    def __call__(self, checkpoint: Path, part: int = 0, parts: int = 1) -> str | None: ...


def folder_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def final_path(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint at `step`."""
    return folder_of(run_dir) / f"step-{step:08d}"


def partial_path(final: Path) -> Path:
    """Return the path of a checkpoint while it is written or removed."""
    return final.with_name(f".{final.name}.part")


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def all_of(run_dir: Path) -> list[Path]:
    """Return all checkpoints of a run by step, oldest first, intact or not."""
    found = (path for path in folder_of(run_dir).glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Return True if a path names a checkpoint, intact or not, rather than a run directory."""
    return (path / MANIFEST).exists() or (_NAME.fullmatch(path.name) is not None and path.is_dir())


def begin(final: Path) -> Path:
    """Create an empty folder for the files of the checkpoint `final`."""
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
    """Write the manifest into `partial`, whose files are on the disk, and rename the folder to `final`.

    An existing `final` is first renamed to `.old`; if the process is killed before the second rename,
    `undo_replacement` renames it back.
    """
    manifest = Manifest(header, time.time(), files, tensors)
    _check(manifest)
    text = _sealed(manifest)
    if len(text) > _LARGEST_MANIFEST:
        raise CheckpointError(
            f"{final}: expected a manifest of at most {_LARGEST_MANIFEST} bytes, found {len(text)}"
        )
    write_through(partial / MANIFEST, text)
    _sync_folder(partial)
    before = final.with_name(f".{final.name}.old")
    if final.exists():
        os.replace(final, before)
    try:
        os.replace(partial, final)
    except OSError:
        undo_replacement(final.parent)
        raise
    _sync_folder(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def undo_replacement(folder: Path) -> None:
    """Rename checkpoints back that a killed process had renamed in order to replace them. Raises OSError."""
    for path in folder.glob(".*.old"):
        final = path.with_name(path.name[1:].removesuffix(".old"))
        if not final.exists() and (path / MANIFEST).exists():
            os.replace(path, final)


def clean(run_dir: Path) -> None:
    """Remove the remains of killed or failed saves; a save in progress is abandoned."""
    with contextlib.suppress(OSError):  # if the file system is unavailable, the next save reports it
        undo_replacement(folder_of(run_dir))
        for gone in folder_of(run_dir).glob(".step-*.gone"):
            shutil.rmtree(gone, ignore_errors=True)
        for path in folder_of(run_dir).glob(".step-*"):
            # Renamed first, so that a process that is still writing cannot publish a half-removed folder.
            shutil.rmtree(path.rename(path.with_suffix(".gone")), ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; its name never refers to an incomplete one."""
    doomed = partial_path(checkpoint)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def superfluous(
    run_dir: Path, *, keep: int, every_steps: int | None, check: IntegrityCheck, until_step: int | None = None
) -> list[Path]:
    """Return the checkpoints to remove: all older than the `keep` newest in which `check` finds
    no problem.

    Checkpoints at multiples of `every_steps` are kept. Checkpoints after `until_step`, which remain when a
    run has resumed from an earlier step, are neither counted nor returned.
    """
    good, found = 0, []
    for checkpoint in reversed(all_of(run_dir)):
        step = step_of(checkpoint)
        if until_step is not None and step > until_step:
            continue
        if good < keep:
            good += check(checkpoint) is None
        elif every_steps is None or step % every_steps:
            found.append(checkpoint)
    return found


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest. Raises CheckpointError if it is missing, damaged, or of a newer format."""
    path = checkpoint / MANIFEST
    try:
        with open_regular(path) as file:
            raw = file.read(_LARGEST_MANIFEST + 1)
        if len(raw) > _LARGEST_MANIFEST:
            raise ValueError(f"more than {_LARGEST_MANIFEST} bytes")
        text = raw.decode()
        held = bounded_json.parse(text)
        if type(form := held.get("format", 1)) is int and form > FORMAT:
            raise CheckpointError(
                f"{path}: expected a checkpoint's manifest, found one of format {form}; install a newer lgaf"
            )
        manifest = _parsed(held)
        _check(manifest)
        is_sealed = _sealed(manifest) == text
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint's manifest, found: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint's manifest, found a damaged one ({type(error).__name__}: {error})"
            "; resume from another checkpoint, or restore this one from a copy"
        ) from error
    if not is_sealed:
        raise CheckpointError(
            f"{path}: expected a checkpoint's manifest, found one that does not match its CRC-32; "
            "resume from another checkpoint, or restore this one from a copy"
        )
    return manifest


def as_json(table: Mapping[str, FileSum | StoredTensor]) -> dict[str, Any]:
    """Return a table of files or of tensors as plain values, by name."""
    return {name: asdict(entry) for name, entry in sorted(table.items())}


def table_from_json(held: dict[str, Any]) -> dict[str, StoredTensor]:
    """Return the table of tensors for which `as_json` returned `held`."""
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
    """Raise ValueError unless values have their types and every row has bytes of its own, described once."""
    header = manifest.header
    if manifest.format not in (1, FORMAT):
        raise ValueError(f"format {manifest.format!r}")
    if not _is_count(header.step) or not _is_time(manifest.time_s):
        raise ValueError(f"step {header.step!r}, written at {manifest.time_s!r}")
    if not all(isinstance(table, dict) for table in (header.config, header.dataset, header.versions)):
        raise ValueError("configuration, dataset and versions, expected tables")
    if header.cursor is not None and not all(map(_is_count, (n for row in header.cursor for n in row))):
        raise ValueError(f"the cursor {header.cursor!r}")
    for name, entry in manifest.files.items():
        if not _is_count(entry.size) or not _CRC32.fullmatch(entry.crc32):
            raise ValueError(f"size {entry.size!r} and CRC-32 {entry.crc32!r} of {name!r}")
        if name == MANIFEST or not _PLAIN.fullmatch(name) or not name.strip("."):
            raise ValueError(f"invalid file name {name!r}")
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ITEM_BYTES or not all(map(_is_count, tensor.shape)):
            raise ValueError(f"invalid tensor {name!r} of dtype {tensor.dtype!r} and shape {tensor.shape!r}")
        row = 0
        for chunk in tensor.chunks:
            if not all(map(_is_count, (chunk.start, chunk.rows, chunk.offset, chunk.length))):
                raise ValueError(f"invalid {chunk!r} of {name!r}")
            if chunk.start != row or chunk.length != chunk.rows * tensor.row_bytes:
                raise ValueError(
                    f"{chunk!r} of {name!r}, expected {tensor.row_bytes} bytes per row, starting at row {row}"
                )
            if chunk.offset + chunk.length > manifest.files[chunk.file].size:
                raise ValueError(f"{chunk!r} of {name!r}, beyond the end of its file")
            row += chunk.rows
        if row != tensor.rows:
            raise ValueError(f"{row} rows of {name!r}, expected {tensor.rows}")
    ends = dict.fromkeys(manifest.files, 0)
    chunks = (chunk for tensor in manifest.tensors.values() for chunk in tensor.chunks)
    for chunk in sorted(chunks, key=lambda chunk: (chunk.offset, chunk.length)):
        if chunk.offset < ends[chunk.file]:
            raise ValueError(f"{chunk!r}, which overlaps another chunk")
        ends[chunk.file] = chunk.offset + chunk.length


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_time(value: object) -> bool:
    return type(value) is float and 0 <= value < _YEAR_5000_S


def wrong_size(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return the first problem of the manifest and of the sizes of the files: an `IntegrityCheck`."""
    return _first_wrong(_wrong_size, checkpoint, part, parts)


def wrong_sum(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return the first problem of the manifest and of every byte of the files: an `IntegrityCheck`."""
    return _first_wrong(_wrong_sum, checkpoint, part, parts)


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return the first problem of sizes, which is fast, and then of every byte: an `IntegrityCheck`."""
    return wrong_size(checkpoint, part, parts) or wrong_sum(checkpoint, part, parts)


def _first_wrong(
    wrong: Callable[[Path, FileSum], str | None], checkpoint: Path, part: int, parts: int
) -> str | None:
    """Return the problem of the manifest, or of the first bad file of a part; None if all are intact."""
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
        return f"{path}: expected a readable file, found: {error.strerror}"
    return None if found == wanted else f"{path}: expected CRC-32 {wanted.crc32}, found {found.crc32}"


def _share(manifest: Manifest, part: int, parts: int) -> Iterable[tuple[str, FileSum]]:
    """Return the files of one part; large files are distributed first, which balances the parts."""
    return sorted(manifest.files.items(), key=lambda item: -item[1].size)[part::parts]


def _sealed(manifest: Manifest) -> str:
    """Return the text of a manifest, with its CRC-32 at the end; `read_manifest` accepts only this text."""
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
