"""`lgaf data`: generate, pack, convert, inspect and validate datasets."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pydantic import BaseModel, Field

from data_pipeline.common.atomic_write import staged_file
from data_pipeline.common.image_header import SIDES_PX
from data_pipeline.common.progress_bar import progress_bar
from data_pipeline.common.terminal import echo
from data_pipeline.config import AugmentConfig
from data_pipeline.indexed.catalog import Catalog, open_catalog, read_property
from data_pipeline.synthetic import dataset as synthetic_set
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.synthetic.shard import write_shard
from data_pipeline.tools import convert as conversion
from data_pipeline.tools import inspect as inspection
from data_pipeline.tools import pack as packing
from data_pipeline.tools import validate as validation
from trainer import config_file

app = typer.Typer(no_args_is_help=True, help="Generate, pack, convert, inspect and validate face datasets.")

_NEW_FOLDER = "Folder to write; new or empty."
_SAMPLE = 256
_SHEET = {"classes": 8, "images": 10, "size": 112}
_FILES_NAMED = 6
_DAMAGE_NAMED = 5
_BAD_NAMED = 10


class _AugmentData(BaseModel):
    augment: AugmentConfig = Field(description="the augmentation to show")


class _AugmentFile(BaseModel):
    """A training configuration, of which only [data.augment] is read."""

    data: _AugmentData = Field(description="the table that holds augment")


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def _file(text: str) -> Any:
    return typer.Option(metavar="FILE", help=text, show_default=False)


def _print_keys(wanted: bool) -> None:
    if wanted:
        echo(config_file.help_text(SynthConfig))
        raise typer.Exit


_SetFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TOML file with the dataset's configuration.")
]
_SetKeys = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be repeated."),
]

_HelpKeys = Annotated[
    bool,
    typer.Option(
        "--help-config", help="Print all configuration keys and exit.", callback=_print_keys, is_eager=True
    ),
]


@app.command()
def synth(
    folder: Annotated[Path, _argument("DIR", _NEW_FOLDER)],
    config: _SetFile = None,
    overrides: _SetKeys = None,
    help_config: _HelpKeys = False,
) -> None:
    """Generate synthetic faces: a training set, and a verification set of held-out identities.

    Writes to DIR: train.rec, train.idx and property in InsightFace's format;
    held_out.bin with the pairs; two tables of each image's pose, lighting,
    occlusion and other factors; synth.json with the configuration.

    The same configuration generates the same dataset. If DIR holds it already, nothing is written.
    """
    wanted = config_file.load(SynthConfig, config, overrides or [])
    start = time.monotonic()
    with progress_bar("rendering") as progress:
        is_new = synthetic_set.write_set(folder, wanted, progress)
    if not is_new:
        echo(f"{folder} holds this dataset already; nothing to do")
        return
    seconds = time.monotonic() - start
    rate = (wanted.images + 2 * wanted.pairs) / seconds
    echo(
        f"{folder}: {wanted.images} images of {wanted.identities} identities, {wanted.pairs} pairs of "
        f"{wanted.held_out_identities} held-out identities ({seconds:.1f} s, {rate:.0f} images/s)"
    )


@app.command("paint", hidden=True)  # the former name, which older configurations call
@app.command()
def render(
    part: Annotated[str, _argument("K/N", "Part K of N to render, such as 0/50 to 49/50.")],
    config: _SetFile = None,
    overrides: _SetKeys = None,
    help_config: _HelpKeys = False,
) -> None:
    """Render synthetic training faces and write them as a tar shard to standard output, for streaming.

    The images are those of `lgaf data synth` with the same configuration. A
    training that streams them renders them while it runs and stores none on disk.
    Each rank renders with all cores, unless `processes` sets fewer:

    data.shards = ["pipe:lgaf data render {0..49}/50 --set identities=100000"]
    """
    wanted = config_file.load(SynthConfig, config, overrides or [])
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"{part}: expected a part and the number of parts, such as 0/50 or 49/50")
    if sys.stdout.isatty():
        raise ValueError(
            "standard output: expected a file or a pipe for a tar shard, found a terminal; redirect it"
        )
    write_shard(sys.stdout.buffer, wanted, int(found[1]), int(found[2]))


@app.command()
def inspect(
    folders: Annotated[
        list[Path],
        _argument(
            "DIR...",
            "Folder with .rec files, or with a sub-folder of images per identity. The classes of several "
            "folders are numbered consecutively.",
        ),
    ],
    sheet: Annotated[
        Path, typer.Option(metavar="PNG", help="Contact sheet to write; an existing file is replaced.")
    ] = Path("contact_sheet.png"),
    augment: Annotated[
        Path | None,
        _file("Training configuration (TOML) whose [data.augment] is applied to the sheet's images."),
    ] = None,
) -> None:
    """Print facts about a dataset, and write a contact sheet of some of its classes with their labels."""
    changes = None if augment is None else config_file.load(_AugmentFile, augment).data.augment
    catalog = open_catalog(folders)
    for name, value in _facts(catalog):
        echo(f"{name:<18}{value}")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    image = inspection.contact_sheet(catalog, **_SHEET, augmentation=changes)
    with staged_file(sheet) as partial:
        image.save(partial, "PNG")
    echo(f"{'contact sheet':<18}{sheet}")


_SHARD_SAMPLES = typer.Option(min=1, help="Images in each tar shard.")
_MAX_IMAGE_SIDE = typer.Option(min=SIDES_PX[0], help="Largest accepted width and height of an image, pixels.")


@app.command()
def pack(
    source: Annotated[
        Path,
        _argument("SOURCE", "Folder with one sub-folder of images for each identity, or a list of images."),
    ],
    out: Annotated[Path, _argument("OUT", _NEW_FOLDER)],
    form: Annotated[
        packing.Format, typer.Option("--format", help="RecordIO (train.rec) or WebDataset tar shards.")
    ] = "rec",
    size: Annotated[int, typer.Option(min=16, help="Width and height of the stored images, pixels.")] = 112,
    quality: Annotated[int, typer.Option(min=1, max=95, help="JPEG quality of the stored images.")] = 95,
    hold_out: Annotated[
        int, typer.Option(min=0, help="Number of identities, the last ones, held out for verification.")
    ] = 0,
    shard_samples: Annotated[int, _SHARD_SAMPLES] = 10_000,
    max_image_side: Annotated[int, _MAX_IMAGE_SIDE] = SIDES_PX[1],
) -> None:
    """Pack images into train.rec, train.idx and property, or into shards train-000000.tar, ...

    Each sub-folder of a folder is one class; identities.tsv lists their names.
    With --hold-out, held_out.bin holds pairs of images of the held-out identities.

    A list has lines of path<TAB>label, or path,label if its name ends in .csv;
    the first line may name the columns. Labels that float32 cannot represent are
    written to train.labels.npy.

    Images are cropped to their central square and resized; a JPEG of the right size is copied unchanged.
    JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, PGM, AVIF and JPEG 2000 are read.
    """
    is_list = source.is_file()
    if is_list and hold_out:
        raise ValueError(
            f"{source}: --hold-out {hold_out} expects a folder of identities, found a list; remove --hold-out"
        )
    with progress_bar("packing") as progress:
        options = packing.PackOptions(form, size, quality, shard_samples, max_image_side)
        if is_list:
            done = packing.pack_list(source, out, options, progress=progress)
        else:
            done = packing.pack_folder(source, out, options, hold_out=hold_out, progress=progress)
    echo(
        f"{out}: {done.images} images of {done.identities} identities, {done.image_bytes / 1e6:.1f} MB "
        f"({done.kept_images} copied unchanged)"
        + (f"; {done.pairs} pairs of {hold_out} held-out identities" if hold_out else "")
    )


@app.command()
def convert(
    source: Annotated[Path, _argument("SOURCE", "Folder with train.rec and train.idx, or with *.tar.")],
    out: Annotated[Path, _argument("OUT", "Folder to write in the other format.")],
    shard_samples: Annotated[int, _SHARD_SAMPLES] = 10_000,
) -> None:
    """Convert RecordIO to WebDataset tar shards, or shards to RecordIO; images are copied byte for byte.

    If a conversion to shards is killed, the same command resumes after the last
    complete shard; a conversion to RecordIO restarts. Verification sets and other
    files are not copied.
    """
    with progress_bar("converting") as progress:
        images, there = conversion.convert(source, out, shard_samples=shard_samples, progress=progress)
    echo(f"{out}: {images} images" + (f", {there} of them converted before" if there else ""))


@app.command()
def validate(
    folders: Annotated[list[Path], _argument("DIR...", "The datasets, as in data.path.")],
    report: Annotated[
        Path | None, _file("File to write all bad records to, one JSON object per line.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.", show_default=False)
    ] = None,
    max_image_side: Annotated[int, _MAX_IMAGE_SIDE] = SIDES_PX[1],
) -> None:
    """Read and decode every record of the datasets; exit with code 1 if one is bad.

    Training skips bad records up to data.max_bad_share; this command finds all of them in advance.
    """
    start = time.monotonic()
    with progress_bar("validating") as progress:
        found = validation.validate(folders, None, progress, processes, max_image_side)
    good, seconds = found.kinds.total(), time.monotonic() - start
    for kind, count in found.kinds.most_common():
        echo(f"{kind:<18}{count}")
    echo(f"{'bad':<18}{len(found.bad)} of {good + len(found.bad)} ({seconds:.1f} s)")
    if report is not None:
        with staged_file(report) as partial:
            partial.write_text("".join(one.line() for one in found.bad), encoding="utf-8")
    for one in found.bad[:_BAD_NAMED]:
        echo(f"  {one}")
    if found.bad:
        raise typer.Exit(1)


def _facts(catalog: Catalog) -> Iterator[tuple[str, str]]:
    # Without an entry for each class: a single wrong label can claim billions of them.
    count_L = np.sort(np.unique(catalog.label_N, return_counts=True)[1])
    empty = catalog.num_classes - len(count_L)
    middle = [at // 2 - empty for at in (catalog.num_classes - 1, catalog.num_classes)]
    median = sum(int(count_L[at]) if at >= 0 else 0 for at in middle) / 2
    yield "images", f"{len(catalog)} (keys {catalog.key_N.min()} to {catalog.key_N.max()})"
    for dataset in catalog.datasets:
        files = dataset.files
        names = ", ".join(files.name(i) for i in range(min(len(files), _FILES_NAMED)))
        more = f" and {len(files) - _FILES_NAMED} more" if len(files) > _FILES_NAMED else ""
        yield "files", f"{names}{more} in {dataset.folder}, {files.size_F.sum() / 1e6:.1f} MB"
        said = read_property(dataset.folder)
        yield "property", "none" if said is None else f"{said[0]} classes, {said[1]}x{said[2]} pixels"
    yield "classes", f"{catalog.num_classes}"
    yield "labels", f"{catalog.label_N.min()} to {catalog.label_N.max()}"
    yield (
        "images per class",
        f"{0 if empty else count_L[0]} to {count_L[-1]}, median {median:g}, {empty} empty",
    )
    yield "damaged records", f"{len(catalog.damaged_K)}"
    for reason in catalog.damage(_DAMAGE_NAMED):
        yield "", reason
    kinds = inspection.image_kinds(catalog, _SAMPLE)
    shares = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    yield "image sizes", f"{shares} in a sample of {kinds.total()}"
