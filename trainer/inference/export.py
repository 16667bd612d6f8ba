"""A trained network as a file for other programs; the suffix says which kind.

    .safetensors    weights and configuration, read by
                    `trainer.inference.network.load_backbone` and by any language
    .onnx           the graph from images to embeddings, for onnxruntime, TensorRT, OpenVINO...
    .pt2            the same graph for torch alone (`torch.export.load`), without this project

Graphs take any number of images at once. What was written is read back and run, by onnxruntime where it is
installed, on a few random images beside the network itself; a file that says something else never gets its
name. What an image must look like stands in each file's metadata (`Network.facts`).
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

# Most that an entry of an embedding may be off, as a share of the embedding's length. Float32 summed in
# another order is off by about 1e-6; an operator that was translated wrongly by far more than this.
TOLERANCE = 1e-4
# Different from the number with which a graph is traced, so that one which kept that number is found out.
_TRACED, _CHECKED = 2, 3
_FACTS_FILE = "lgaf.json"

Embed = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """How a network is written to a file, and how the file's own reader embeds images [B, 3, S, S] by it."""

    packages: tuple[str, ...]
    write: Callable[[Network, Path], None]
    read: Callable[[Path], Embed | None]


def export(network: Network, out: Path) -> float | None:
    """Write a network, which is moved to the CPU, to the file `out`.

    Returns the largest difference between an embedding by the file and by the network, as a share of the
    embedding's length; None if there is no onnxruntime to run the file.

    Raises ValueError as `format_of` does, or if a file embeds differently.
    """
    form = format_of(out)
    network.model.cpu()
    with staged_file(out) as partial:
        form.write(network, partial)
        return _difference(network, form.read(partial), out)


def format_of(out: Path) -> Format:
    """The format of a file by its suffix. Raises ValueError if it is none, or needs a missing package."""
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
            f"{out}: expected finite embeddings of the network itself, found NaN or infinity; not written. "
            "Its training has diverged: use an earlier checkpoint"
        )
    length_B1 = expected_BD.norm(dim=1, keepdim=True)
    difference = ((embed(images_BCHW) - expected_BD) / length_B1).abs().max().item()
    if not difference <= TOLERANCE:  # NaN as well
        raise ValueError(
            f"{out}: expected the embeddings of the network, found some that differ by {difference:.1e} of "
            f"their length, more than {TOLERANCE:g}; not written. Try other versions of torch and onnx"
        )
    return difference


class _Embedding(nn.Module):
    """Images in, the embedding alone out."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The embedding [B, D] of images [B, 3, S, S]."""
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
    program.save(out, external_data=False)  # one file, which may have up to 2 GiB


def _read_onnx(path: Path) -> Embed | None:
    if find_spec("onnxruntime") is None:
        return None
    onnxruntime = require("onnxruntime", "dev")
    # It would keep an identity of this machine in the home folder, and warns where that cannot be written.
    onnxruntime.disable_telemetry_events()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: torch.from_numpy(session.run(None, {"images": images_BCHW.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own old ways and of packages that nothing here uses."""
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
