"""`lgaf export`, `lgaf embed` and `lgaf compare`: what one does with a trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.common.progress_bar import progress_bar

NETWORK_HELP = "a checkpoint's folder, a run directory (its newest), or a network's .pt or .safetensors file"
_CHECKPOINT = typer.Option(metavar="CHECKPOINT", help=NETWORK_HELP, show_default=False)
_BAD_SHOWN = 10


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=NETWORK_HELP, show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="file to write: .safetensors (weights), .onnx or .pt2 (torch.export) (graphs)",
            show_default=False,
        ),
    ],
) -> None:
    """Write a trained network for other programs. The file is run once, to see that it embeds the same.

    Its metadata say what images it takes: RGB, (pixel - 127.5) / 127.5, any number of them at once.
    """
    from trainer.inference import export as exporting
    from trainer.inference import network as extraction

    exporting.format_of(out)
    difference = exporting.export(extraction.network_alone(checkpoint), out)
    checked = (
        "not run, as onnxruntime is not installed"
        if difference is None
        else f"embeddings differ from the network's by at most {difference:.1e} of their length"
    )
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; {checked}")


def embed(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES", help="pictures of aligned faces, or folders of them", show_default=False
        ),
    ],
    checkpoint: Annotated[Path, _CHECKPOINT],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="file to write: .npz or .parquet", show_default=False)
    ],
    flip: Annotated[
        bool, typer.Option("--flip", help="mean over each picture and its mirror image; takes twice as long")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures embedded at once")] = 64,
) -> None:
    """Write embeddings and qualities of all pictures, sorted by name within each folder.

    Pictures of another size than the network's are resized to it. A file that is
    no picture gets a row with its `error` and NaN for numbers; the exit code is 1
    only if none is a picture.
    """
    from trainer.inference import embed as embedding
    from trainer.inference import embedding_file
    from trainer.inference import network as extraction

    embedding_file.opener(out)
    network = extraction.network_alone(checkpoint)
    facts = {"checkpoint": str(checkpoint)}
    with progress_bar("embedding") as report:
        files, bad = embedding.embed(
            network, images, out, batch_size=batch_size, flip=flip, facts=facts, report=report
        )
    for path, reason in bad[:_BAD_SHOWN]:
        typer.echo(f"lgaf: {path}: {reason}", err=True)
    if bad:
        typer.echo(f"lgaf: {len(bad)} of {files} files are no pictures; {out} names all of them", err=True)
    typer.echo(f"{out}: {files - len(bad)} pictures")


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="picture of an aligned face", show_default=False)
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="another", show_default=False)],
    checkpoint: Annotated[Path, _CHECKPOINT],
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="similarity from which on both show one person; by default the run's own, if it has one",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say how similar two faces are, how good each picture is, and whether both show one person. Prints JSON.

    With flip test, like the evaluation that a run's threshold is from.
    """
    from trainer.evaluation import compare as comparing
    from trainer.inference import network as extraction

    network = extraction.network_alone(checkpoint)
    similarity, quality = comparing.compare(network, first, second)
    found: dict[str, object] = {"similarity": similarity, "quality": quality}
    judge = comparing.known_threshold(checkpoint, network.step)
    if threshold is not None:
        judge = comparing.Threshold(threshold, "--threshold")
    if judge is not None:
        is_same = similarity >= judge.value
        found |= {"same_person": is_same, "threshold": judge.value, "threshold_from": judge.source}
    typer.echo(json.dumps(found, indent=2))
