"""Exported graphs embed as the network does, in batches of any size; one that does not gets no name."""

import json
import os
import sys

import onnx
import onnxruntime
import pytest
import torch

from tests.trainer.networks import STEP, embedded, random_images, small_network
from trainer.inference import export
from trainer.inference.network import write_safetensors

# Of the embedding's length: float32 summed in another order.
TOLERANCE = 1e-5
# The local branch averages 7x7 cells onto a grid of 3x3, which does not divide them.
LGAF = {"image_size": 99, "stem_stride": 2, "mhms": {"heads": ((1, 3),), "grid": 3}}
NETWORKS = {"trunk": {"name": "iresnet", "image_size": 33}, "lgaf": LGAF}


def check(network, embed):
    for count in (1, 3, 8):
        images_BCHW = random_images(count, network.image_size, seed=count)
        expected_BD = embedded(network, images_BCHW)
        difference = (embed(images_BCHW) - expected_BD) / expected_BD.norm(dim=1, keepdim=True)
        assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx(tmp_path, name):
    network, out = small_network(**NETWORKS[name]), tmp_path / "n.onnx"
    assert export.export(network, out) < TOLERANCE
    assert os.listdir(tmp_path) == ["n.onnx"]
    onnx.checker.check_model(out, full_check=True)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    check(network, lambda images: torch.tensor(session.run(["embedding"], {"images": images.numpy()})[0]))
    size = network.image_size
    assert [(one.name, one.shape, one.type) for one in session.get_inputs()] == [
        ("images", ["batch", 3, size, size], "tensor(float)")
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("embedding", ["batch", 16])]
    assert session.get_modelmeta().custom_metadata_map == network.facts()


def test_pt2(tmp_path):
    network, out = small_network(**LGAF), tmp_path / "n.pt2"
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    assert export.export(network, out) < TOLERANCE
    facts = {"lgaf.json": ""}
    check(network, torch.export.load(out, extra_files=facts).module())
    assert json.loads(facts["lgaf.json"])["step"] == str(STEP)
    after = network.model.state_dict()
    assert not network.model.training
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_safetensors_hold_the_very_weights(tmp_path):
    assert export.export(small_network(), tmp_path / "n.safetensors") == 0


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_file_that_embeds_differently_is_not_left(tmp_path, monkeypatch, factor):
    def write_wrongly(network, out):
        other = small_network()
        other.model.trunk.fc.weight.data *= factor
        write_safetensors(other, out)

    form = export.FORMATS[".safetensors"]._replace(write=write_wrongly)
    monkeypatch.setitem(export.FORMATS, ".safetensors", form)
    out = tmp_path / "n.safetensors"
    out.write_text("of yesterday")
    with pytest.raises(ValueError, match=r"n\.safetensors: expected the embeddings of the network, found"):
        export.export(small_network(), out)
    assert os.listdir(tmp_path) == ["n.safetensors"]
    assert out.read_text() == "of yesterday"


def test_a_network_that_has_diverged_is_not_exported(tmp_path):
    network = small_network()
    network.model.trunk.fc.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="embeddings of the network itself, found NaN or infinity"):
        export.export(network, tmp_path / "n.safetensors")
    assert os.listdir(tmp_path) == []


def test_an_unknown_suffix_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors, \.onnx, \.pt2, found '\.pth'"):
        export.format_of(tmp_path / "n.pth")


@pytest.mark.parametrize(("suffix", "package"), [(".onnx", "onnxscript"), (".safetensors", "safetensors")])
def test_a_missing_package_is_named_with_what_brings_it(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"package {package}, .* pip install -e '\.\[export\]'"):
        export.format_of(tmp_path / f"n{suffix}")


def test_without_onnxruntime_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    form = export.Format((), lambda network, out: out.touch(), export.FORMATS[".onnx"].read)
    monkeypatch.setitem(export.FORMATS, ".onnx", form)
    assert export.export(small_network(), tmp_path / "n.onnx") is None


def test_there_must_be_a_folder_for_the_file(tmp_path):
    with pytest.raises(ValueError, match="expected a file to write in an existing folder, found no folder"):
        export.export(small_network(), tmp_path / "missing" / "n.pt2")
