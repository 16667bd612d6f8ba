"""`lgaf data`: make, pack and look at datasets."""

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

from data_pipeline.common.progress_bar import progress_bar
from data_pipeline.config import AugmentConfig
from data_pipeline.indexed.catalog import Catalog, open_catalog, read_property
from data_pipeline.synthetic import dataset as synthetic_set
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.synthetic.shard import write_shard
from data_pipeline.tools import convert as conversion
from data_pipeline.tools import inspect as inspection
from data_pipeline.tools import pack as packing
from data_pipeline.tools import validate as validation
from trainer import config_file as settings

app = typer.Typer(no_args_is_help=True, help="Make, pack, convert, inspect and validate face datasets.")

_SAMPLE = 256
_SHEET = {"classes": 8, "images": 10, "size": 112}
_FILES_NAMED = 6
_DAMAGE_NAMED = 5
_BAD_NAMED = 10


class _AugmentData(BaseModel):
    augment: AugmentConfig = Field(description="the augmentation to show")


class _AugmentFile(BaseModel):
    """A training configuration, of which only [data.augment] is read."""

    data: _AugmentData = Field(description="the table with augment")


def _print_keys(wanted: bool) -> None:
    if wanted:
        typer.echo(settings.help_text(SynthConfig))
        raise typer.Exit


_SetFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TOML file with the set's configuration.")
]
_SetKeys = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be repeated."),
]

_HelpKeys = Annotated[
    bool,
    typer.Option(
        "--help-config", help="Print all configuration keys and end.", callback=_print_keys, is_eager=True
    ),
]


@app.command()
def synth(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write; a new or empty folder.", show_default=False)
    ],
    config: _SetFile = None,
    overrides: _SetKeys = None,
    help_config: _HelpKeys = False,
) -> None:
    """Paint synthetic people: a training set, and a verification set of other people.

    DIR gets train.rec, train.idx and property, which is InsightFace's format,
    held_out.bin with the pairs, what is in each picture as two tables
    (pose, light, occlusion...), and synth.json with the configuration.

    The same configuration gives the same set; where DIR holds it, nothing is done.
    """
    wanted = settings.load(SynthConfig, config, overrides or [])
    start = time.monotonic()
    with progress_bar("painting") as progress:
        is_new = synthetic_set.write_set(folder, wanted, progress)
    if not is_new:
        typer.echo(f"{folder} holds this set already; nothing to do")
        return
    seconds = time.monotonic() - start
    rate = (wanted.images + 2 * wanted.pairs) / seconds
    typer.echo(
        f"{folder}: {wanted.images} images of {wanted.identities} people, {wanted.pairs} pairs of "
        f"{wanted.held_out_identities} others ({seconds:.1f} s, {rate:.0f} images/s)"
    )


@app.command()
def paint(
    part: Annotated[
        str,
        typer.Argument(
            metavar="K/N", help="Which part to paint, of how many: 0/50 to 49/50.", show_default=False
        ),
    ],
    config: _SetFile = None,
    overrides: _SetKeys = None,
    help_config: _HelpKeys = False,
) -> None:
    """Paint synthetic people to train on as a tar shard, on standard output: to stream, not to store.

    The pictures are those of `lgaf data synth` with the same configuration. A
    training that streams them paints them itself, and no disk holds them. Each
    rank paints with all cores, unless processes says less:

    data.shards = ["pipe:lgaf data paint {0..49}/50 --set identities=100000"]
    """
    wanted = settings.load(SynthConfig, config, overrides or [])
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"{part}: expected a part and how many there are, such as 0/50 or 49/50")
    if sys.stdout.isatty():
        raise ValueError("standard output: expected a file or a pipe for a tar shard, found a terminal")
    write_shard(sys.stdout.buffer, wanted, int(found[1]), int(found[2]))


@app.command()
def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folder with .rec files, or with a sub-folder of images per identity; of several, the "
            "classes are numbered through.",
            show_default=False,
        ),
    ],
    sheet: Annotated[
        Path, typer.Option(metavar="PNG", help="Where to write the contact sheet; replaces a file there.")
    ] = Path("contact_sheet.png"),
    augment: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Change the sheet's images as its [data.augment] says; a TOML file as for training.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a dataset holds, and draw a contact sheet of some of its classes with their labels."""
    changes = None if augment is None else settings.load(_AugmentFile, augment).data.augment
    catalog = open_catalog(folders)
    for name, value in _facts(catalog):
        typer.echo(f"{name:<18}{value}")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    inspection.contact_sheet(catalog, **_SHEET, augmentation=changes).save(sheet, "PNG")
    typer.echo(f"{'contact sheet':<18}{sheet}")


_SHARD_SAMPLES = typer.Option(min=1, help="Images in each tar shard.")


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder with one sub-folder of images for each identity; or a list of images.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Where to write; a new or empty folder.", show_default=False)
    ],
    form: Annotated[
        packing.Format, typer.Option("--format", help="RecordIO (train.rec) or WebDataset's tar shards.")
    ] = "rec",
    size: Annotated[int, typer.Option(min=16, help="Width and height of the stored images, pixels.")] = 112,
    quality: Annotated[int, typer.Option(min=1, max=95, help="JPEG quality of the stored images.")] = 95,
    hold_out: Annotated[
        int, typer.Option(min=0, help="Identities, the last ones, to verify on instead of training on them.")
    ] = 0,
    shard_samples: Annotated[int, _SHARD_SAMPLES] = 10_000,
) -> None:
    """Pack images into train.rec, train.idx and property, or into shards train-000000.tar, ...

    Of a folder the sub-folders are the classes, which identities.tsv names.
    With --hold-out, held_out.bin gets pairs of images of the people held out.

    A list has the lines path<TAB>label, or path,label if its name ends in .csv;
    a first line may name the columns. Labels that float32 cannot hold go into
    train.labels.npy.

    Images are cropped to their central square and resized; a JPEG of the right size is kept as it is.
    """
    is_list = source.is_file()
    if is_list and hold_out:
        raise ValueError(f"{source}: --hold-out {hold_out} needs a folder of identities, found a list")
    with progress_bar("packing") as progress:
        how: dict[str, Any] = {"form": form, "size": size, "quality": quality, "shard_samples": shard_samples}
        if is_list:
            done = packing.pack_list(source, out, progress=progress, **how)
        else:
            done = packing.pack_folder(source, out, hold_out=hold_out, progress=progress, **how)
    typer.echo(
        f"{out}: {done.images} images of {done.identities} identities, {done.image_bytes / 1e6:.1f} MB "
        f"({done.kept_images} kept as they were)"
        + (f"; {done.pairs} pairs of {hold_out} others" if hold_out else "")
    )


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder with train.rec and train.idx, or with *.tar.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Where to write the other format.", show_default=False)
    ],
    shard_samples: Annotated[int, _SHARD_SAMPLES] = 10_000,
) -> None:
    """Convert RecordIO to WebDataset's tar shards, or shards to RecordIO; images stay byte for byte.

    Killed on its way to shards, the same command goes on after the last whole
    one; on its way to RecordIO it begins anew. Verification sets and other files
    are not copied.
    """
    with progress_bar("converting") as progress:
        images, there = conversion.convert(source, out, shard_samples=shard_samples, progress=progress)
    typer.echo(f"{out}: {images} images" + (f", {there} of them there before" if there else ""))


@app.command()
def validate(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="The datasets, as in data.path.", show_default=False),
    ],
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to list all bad records, a JSON object a line.", show_default=False
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.", show_default=False)
    ] = None,
) -> None:
    """Read and decode every record of datasets; ends with code 1 if one is bad.

    Training leaves bad records out by itself, up to data.max_bad_share; this finds them all beforehand.
    """
    start = time.monotonic()
    with progress_bar("validating") as progress:
        found = validation.validate(folders, None, progress, processes)
    good, seconds = found.kinds.total(), time.monotonic() - start
    for kind, count in found.kinds.most_common():
        typer.echo(f"{kind:<18}{count}")
    typer.echo(f"{'bad':<18}{len(found.bad)} of {good + len(found.bad)} ({seconds:.1f} s)")
    if report is not None:
        report.write_text("".join(one.line() for one in found.bad), encoding="utf-8")
    for one in found.bad[:_BAD_NAMED]:
        typer.echo(f"  {one}")
    if found.bad:
        raise typer.Exit(1)


def _facts(catalog: Catalog) -> Iterator[tuple[str, str]]:
    count_C = np.bincount(catalog.label_N, minlength=catalog.num_classes)
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
        f"{count_C.min()} to {count_C.max()}, median {np.median(count_C):g}, {(count_C == 0).sum()} without",
    )
    yield "damaged records", f"{len(catalog.damaged_D)}"
    for reason in catalog.damage(_DAMAGE_NAMED):
        yield "", reason
    kinds = inspection.image_kinds(catalog, _SAMPLE)
    shares = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    yield "image sizes", f"{shares} in a sample of {kinds.total()}"
