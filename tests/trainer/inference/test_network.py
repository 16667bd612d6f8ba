"""Network files: written ones are read back, others are refused, and no code in them is executed."""

import os
import pickle
import re
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.trainer.networks import STEP, small_network
from trainer.inference.network import load_backbone, read_network, write_pt, write_safetensors


@pytest.fixture(scope="module")
def network():
    return small_network()


def write(network, out):
    {".pt": write_pt, ".safetensors": write_safetensors}[out.suffix](network, out)
    return out


@pytest.mark.parametrize("name", ["n.pt", "n.safetensors"])
def test_a_network_comes_back_as_it_was(network, tmp_path, name):
    out = write(network, tmp_path / name)
    read = read_network(out)
    assert (read.config, read.image_size, read.step) == (network.config, 32, STEP)
    assert not read.model.training
    expected, found = network.model.state_dict(), load_backbone(out).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert os.listdir(tmp_path) == [name]


def test_others_may_read_what_is_written(network, tmp_path):
    modes = {
        stat.S_IMODE(write(network, tmp_path / name).stat().st_mode) for name in ("n.pt", "n.safetensors")
    }
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


@pytest.mark.parametrize("room", [0, 500, 5000])
def test_a_full_disk_is_named_and_nothing_is_left(room, network, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=rf"^{re.escape(str(tmp_path / 'n.pt'))}: expected space to write"):
            write_pt(network, tmp_path / "n.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_safetensors_say_what_images_they_take(network, tmp_path):
    with safe_open(write(network, tmp_path / "n.safetensors"), "pt") as opened:
        facts = opened.metadata()
    assert facts["image_size"] == "32"
    assert "[batch, 3, 32, 32], colours RGB, values (pixel - 127.5) / 127.5" in facts["input"]
    assert "[batch, 16]" in facts["output"]


@pytest.mark.parametrize("name", ["n.pt", "n.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"\0" * 99, b"PK\3\4 and no archive"])
def test_what_is_no_network_is_named(tmp_path, name, damage):
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{name}: expected a network that .* found: \S"):
        load_backbone(tmp_path / name)


def test_a_file_cut_short_is_named(network, tmp_path):
    for name in ("n.pt", "n.safetensors"):
        out = write(network, tmp_path / name)
        out.write_bytes(out.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=f"{name}: expected a network"):
            load_backbone(out)


def test_weights_of_another_program_are_named(network, tmp_path):
    bare = tmp_path / "backbone.pt"
    torch.save(network.model.state_dict(), bare)
    with pytest.raises(ValueError, match="found: no 'backbone'"):
        load_backbone(bare)
    torch.save(torch.zeros(3), bare)
    with pytest.raises(ValueError, match=r"backbone\.pt: expected a network"):
        load_backbone(bare)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="found: no 'backbone'"):
        load_backbone(foreign)


def test_a_missing_weight_is_named(network, tmp_path):
    out = write(network, tmp_path / "n.pt")
    content = torch.load(out, weights_only=True)
    del content["state"]["trunk.fc.bias"]
    torch.save(content, out)
    with pytest.raises(ValueError, match=r"n\.pt: expected a network"):
        load_backbone(out)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_in_a_file_is_run(tmp_path):
    marker, out = tmp_path / "was here", tmp_path / "n.pt"
    torch.save({"backbone": Malicious(marker)}, out)
    with pytest.raises(ValueError, match="expected a network"):
        load_backbone(out)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()
