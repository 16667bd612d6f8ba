"""Export of a trained network for other programs; the suffix selects the format.

    .safetensors    weights and configuration, for
                    `trainer.inference.network.load_backbone` and for any language
    .onnx           the graph from images to embeddings, for onnxruntime, TensorRT, OpenVINO...
    .pt2            the same graph for torch alone (`torch.export.load`), without this project

Graphs take batches of any size. Each file is read back and run on a few random images, with onnxruntime if it
is installed; it gets its final name only if its embeddings equal the network's. Its metadata describe the
input (`Network.facts`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data_pipeline.common.atomic_write import staged_file
from trainer.backbones import Backbone
from trainer.inference.network import SAFETENSORS, Network, load_backbone, write_safetensors
from trainer.inference.optional_import import require

# The largest tolerated error of an embedding's entry, relative to the embedding's norm. Another order of
# float32 sums causes about 1e-6; a wrongly translated operator far more than this tolerance.
TOLERANCE = 1e-4
# Batch sizes of tracing and checking. They differ, so that the check detects a graph with a fixed batch size.
_TRACED, _CHECKED = 2, 3
_FACTS_FILE = "lgaf.json"

Embed = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A file format: required packages, a writer, and a reader that returns an embedding function or None."""

    packages: tuple[str, ...]
    write: Callable[[Network, Path], None]
    read: Callable[[Path], Embed | None]


def export(network: Network, out: Path) -> float | None:
    """Move a network to the CPU and write it to the file `out`.

    Return the largest difference between embeddings of the file and of the network, relative to the
    embedding's norm; None if onnxruntime, which would run the file, is not installed.

    Raises ValueError as `format_of` does, or if the file's embeddings differ from the network's.
    """
    form = format_of(out)
    network.model.cpu()
    with staged_file(out) as partial:
        form.write(network, partial)
        return _difference(network, form.read(partial), out)


def format_of(out: Path) -> Format:
    """Return the format of a suffix. Raises ValueError if it is unknown or needs a missing package."""
    form = FORMATS.get(out.suffix)
    if form is None:
        raise ValueError(f"{out}: expected a name that ends in {', '.join(FORMATS)}, found {out.suffix!r}")
    for package in form.packages:
        require(package, "export")
    return form


@torch.no_grad()
def _difference(network: Network, embed: Embed | None, out: Path) -> float | None:
    if embed is None:
        return None
    size = network.image_size
    images_BCHW = torch.rand(_CHECKED, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected_BD = network.model(images_BCHW).emb_BD
    if not expected_BD.isfinite().all():
        raise ValueError(
            f"{out}: expected finite embeddings of the network itself, found NaN or infinity; the file was "
            "not written. The training has diverged: use an earlier checkpoint"
        )
    length_B1 = expected_BD.norm(dim=1, keepdim=True)
    difference = ((embed(images_BCHW) - expected_BD) / length_B1).abs().max().item()
    if not difference <= TOLERANCE:  # NaN as well
        raise ValueError(
            f"{out}: expected the embeddings of the network, found some that differ by {difference:.1e} of "
            f"their norm, which exceeds {TOLERANCE:g}; the file was not written. Try other versions of torch "
            "and onnx"
        )
    return difference


class _Embedding(nn.Module):
    """A network whose only output is the embedding."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings [B, D] of images [B, 3, S, S]."""
        return self.model(images).emb_BD


def _traced(network: Network) -> ExportedProgram:
    # A copy: tracing sets attributes on the modules.
    module = _Embedding(copy.deepcopy(network.model)).eval()
    images_BCHW = torch.zeros(_TRACED, 3, network.image_size, network.image_size)
    with _quiet():
        return torch.export.export(module, (images_BCHW,), dynamic_shapes=({0: Dim("batch")},))


def _read_safetensors(path: Path) -> Embed:
    model = load_backbone(path)
    return lambda images_BCHW: model(images_BCHW).emb_BD


def _write_pt2(network: Network, out: Path) -> None:
    torch.export.save(_traced(network), out, extra_files={_FACTS_FILE: json.dumps(network.facts())})


def _read_pt2(path: Path) -> Embed:
    with _quiet():
        return torch.export.load(path).module()


def _write_onnx(network: Network, out: Path) -> None:
    with _quiet():
        program = torch.onnx.export(
            _traced(network),
            dynamo=True,
            input_names=["images"],
            output_names=["embedding"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(network.facts())
    program.save(out, external_data=False)  # one file of at most 2 GiB


def _read_onnx(path: Path) -> Embed | None:
    if find_spec("onnxruntime") is None:
        return None
    onnxruntime = require("onnxruntime", "dev")
    # Telemetry would store an ID of this machine in the home folder, and warn if it cannot be written.
    onnxruntime.disable_telemetry_events()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: torch.from_numpy(session.run(None, {"images": images_BCHW.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings of torch's own deprecated calls and of packages not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


FORMATS = {
    SAFETENSORS: Format(("safetensors",), write_safetensors, _read_safetensors),
    ".onnx": Format(("onnx", "onnxscript"), _write_onnx, _read_onnx),
    ".pt2": Format((), _write_pt2, _read_pt2),
}
