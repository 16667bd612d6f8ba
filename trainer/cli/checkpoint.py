"""`lgaf checkpoint`: list, show, verify, convert and prune a run's checkpoints, and extract the network."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.common.redaction import redacted_values
from data_pipeline.common.terminal import echo
from trainer.checkpoint import directory

app = typer.Typer(no_args_is_help=True, help="List, verify, prune and extract the checkpoints of a run.")

_RUN = typer.Argument(metavar="RUN", help="run directory", show_default=False)
_EITHER = typer.Argument(metavar="RUN", help="a checkpoint's folder, or a run directory", show_default=False)


@app.command("ls")
def list_checkpoints(run: Annotated[Path, _RUN]) -> None:
    """Show step, time, size and state of every checkpoint; checks file sizes only, unlike `verify`."""
    echo(f"{'step':>10}  {'written':19}  {'MiB':>9}  state")
    for checkpoint in _all_of(run):
        problem = directory.wrong_size(checkpoint)
        try:
            written = _time(directory.read_manifest(checkpoint).time_s)
        except directory.CheckpointError:
            written = "unknown"
        size_mib = sum(file.lstat().st_size for file in checkpoint.iterdir()) / 2**20
        state = "complete" if problem is None else f"damaged: {problem}"
        echo(f"{directory.step_of(checkpoint):10}  {written:19}  {size_mib:9.1f}  {state}")


@app.command()
def show(checkpoint: Annotated[Path, _EITHER]) -> None:
    """Show the manifest of a checkpoint, or of a run's newest one: step, dataset, files, configuration."""
    chosen = _chosen(checkpoint)[-1]
    manifest = directory.read_manifest(chosen)
    header = manifest.header
    echo(f"{chosen}: step {header.step}, written {_time(manifest.time_s)}")
    echo(f"dataset   {_pairs(header.dataset)}")
    echo(f"versions  {_pairs(header.versions)}")
    for name, entry in manifest.files.items():
        echo(f"file      {name}: {entry.size} bytes, CRC-32 {entry.crc32}")
    echo(f"configuration\n{json.dumps(redacted_values(header.config), indent=2)}")


@app.command()
def verify(checkpoint: Annotated[Path, _EITHER]) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of a run; exit with code 1 if one is damaged."""
    is_damaged = False
    for one in _chosen(checkpoint):
        problem = directory.damage(one)
        is_damaged |= problem is not None
        echo(f"{one.name}: {'intact' if problem is None else f'damaged: {problem}'}")
    if is_damaged:
        raise typer.Exit(1)


@app.command()
def convert(checkpoint: Annotated[Path, _EITHER]) -> None:
    """Convert a checkpoint, or all of a run, from format 1 (pickled metadata) to the current format."""
    from trainer.checkpoint import convert as conversion

    # A conversion that was killed may have left a checkpoint under its temporary name.
    for folder in (directory.folder_of(checkpoint), checkpoint.resolve().parent):
        directory.undo_replacement(folder)
    has_failed = False
    for one in _chosen(checkpoint):
        try:
            is_old = directory.read_manifest(one).format != directory.FORMAT
            if is_old:
                conversion.convert(one)
            echo(f"{one.name}: {'converted' if is_old else 'has the current format already'}")
        except directory.CheckpointError as error:
            has_failed = True
            echo(f"{one.name}: not converted: {error}", err=True)
    if has_failed:
        raise typer.Exit(1)


@app.command()
def prune(
    run: Annotated[Path, _RUN],
    keep: Annotated[int, typer.Option(min=1, help="number of newest intact checkpoints to keep")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list the checkpoints to remove")] = False,
) -> None:
    """Remove old checkpoints and keep the newest intact ones, after reading every byte of those.

    Checkpoints that checkpoint.keep_every_steps preserves stay.
    """
    found = _all_of(run)
    every_steps = next(map(_kept_every_steps, filter(_has_manifest, reversed(found))), None)
    for checkpoint in directory.superfluous(run, keep=keep, every_steps=every_steps, check=directory.damage):
        if not dry_run:
            directory.remove(checkpoint)
        echo(f"{'would remove' if dry_run else 'removed'} {checkpoint}")


@app.command()
def extract(
    checkpoint: Annotated[Path, _EITHER],
    out: Annotated[Path, typer.Option(metavar="FILE", help="file to write", show_default=False)],
) -> None:
    """Write the network of a checkpoint (or of a run's newest intact one) to a file, without the classifier.

    torch.load(FILE, weights_only=True) returns a dictionary: `backbone`, its
    configuration; `image_size`; `step`; `state`, for load_state_dict.
    trainer.inference.network.load_backbone(FILE) builds the network from it.
    """
    from trainer.inference.network import network_alone, write_pt

    write_pt(network_alone(checkpoint), out)


def _all_of(run: Path) -> list[Path]:
    found = directory.all_of(run)
    if not found:
        raise directory.CheckpointError(
            f"{run}: expected a run directory with checkpoints in {directory.folder_of(run)}, found none"
        )
    return found


def _chosen(path: Path) -> list[Path]:
    return [path] if directory.is_checkpoint(path) else _all_of(path)


def _has_manifest(checkpoint: Path) -> bool:
    try:
        directory.read_manifest(checkpoint)
    except directory.CheckpointError:
        return False
    return True


def _kept_every_steps(checkpoint: Path) -> int | None:
    config = directory.read_manifest(checkpoint).header.config
    match config.get("checkpoint"):
        case {"keep_every_steps": int() as every_steps} if every_steps > 0:
            return every_steps
    return None


def _time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).isoformat(" ", "seconds")


def _pairs(values: dict[str, int] | dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
