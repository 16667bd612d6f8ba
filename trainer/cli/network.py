"""`lgaf export`, `lgaf embed` and `lgaf compare`: commands that use a trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.common.progress_bar import progress_bar
from data_pipeline.common.terminal import echo

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
    """Write a trained network for other programs, and run the file once to check its embeddings.

    The file's metadata describe its input: RGB images, (pixel - 127.5) / 127.5, in batches of any size.
    """
    from trainer.inference import export as exporting
    from trainer.inference.network import network_alone

    exporting.format_of(out)
    difference = exporting.export(network_alone(checkpoint), out)
    checked = (
        "not checked, as onnxruntime is not installed"
        if difference is None
        else f"embeddings differ from the network's by at most {difference:.1e} of their length"
    )
    echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; {checked}")


def embed(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES", help="images of aligned faces, or folders of them", show_default=False
        ),
    ],
    checkpoint: Annotated[Path, _CHECKPOINT],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="file to write: .npz or .parquet", show_default=False)
    ],
    flip: Annotated[
        bool, typer.Option("--flip", help="average each image and its mirror image; takes twice as long")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="images embedded at once")] = 64,
) -> None:
    """Write embeddings and qualities of all images, sorted by name within each folder.

    Images are resized to the network's image size. A file that cannot be read as
    an image gets a row with its `error` and NaN for all numbers. The exit code is
    1 only if no file can be read as an image.
    """
    from trainer.inference import embed as embedding
    from trainer.inference import embedding_file
    from trainer.inference.network import network_alone

    embedding_file.opener(out)
    network = network_alone(checkpoint)
    facts = {"checkpoint": str(checkpoint)}
    with progress_bar("embedding") as report:
        files, bad = embedding.embed(
            network, images, out, batch_size=batch_size, flip=flip, facts=facts, report=report
        )
    for path, reason in bad[:_BAD_SHOWN]:
        echo(f"lgaf: {path}: {reason}", err=True)
    if bad:
        text = f"{len(bad)} of {files} files could not be read as images; {out} lists all of them"
        echo(f"lgaf: {text}", err=True)
    echo(f"{out}: {files - len(bad)} images")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="image of an aligned face", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="another image", show_default=False)],
    checkpoint: Annotated[Path, _CHECKPOINT],
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="lowest similarity of one person; by default the threshold of the run's evaluation, if any",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print as JSON the similarity of two faces, each image's quality, and whether both show one person.

    Both images are embedded with the flip test, as in the evaluation that set the run's threshold.
    """
    from trainer.evaluation import compare as comparing
    from trainer.inference.network import network_alone

    network = network_alone(checkpoint)
    similarity, quality = comparing.compare(network, first, second)
    found: dict[str, object] = {"similarity": similarity, "quality": quality}
    judge = comparing.known_threshold(checkpoint, network.step)
    if threshold is not None:
        judge = comparing.Threshold(threshold, "--threshold")
    if judge is not None:
        is_same = similarity >= judge.value
        found |= {"same_person": is_same, "threshold": judge.value, "threshold_from": judge.source}
    echo(json.dumps(found, indent=2))
