"""Weights to begin with: where they go, and files that do not fit."""

import os

import pytest
import torch

from trainer.backbones import build, weights


@pytest.fixture
def trunk_state(config):
    """The state dict of a plain IResNet as deep and wide as the trunk of `lgaf`."""
    torch.manual_seed(5)
    return config.build_trunk(32).state_dict()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


def test_a_file_by_the_published_names_is_the_whole_of_iresnet(config, trunk_state, file):
    torch.save(trunk_state, file)
    net = config.build_trunk(32)
    weights.load(net, file)
    assert all(tensor.equal(trunk_state[name]) for name, tensor in net.state_dict().items())


def test_it_is_the_global_branch_of_lgaf(lgaf, trunk_state, file):
    local = {name: tensor.clone() for name, tensor in lgaf.mhms.state_dict().items()}
    torch.save(trunk_state, file)
    weights.load(lgaf, file)
    assert all(tensor.equal(trunk_state[name]) for name, tensor in lgaf.trunk.state_dict().items())
    assert all(tensor.equal(local[name]) for name, tensor in lgaf.mhms.state_dict().items())


def test_an_extracted_file_is_the_whole_of_lgaf(config, lgaf, file):
    torch.save({"backbone": config.model_dump(mode="json"), "step": 3, "state": lgaf.state_dict()}, file)
    torch.manual_seed(7)
    other = build(config, 32)
    weights.load(other, file)
    assert all(tensor.equal(lgaf.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_the_sum_tells_files_apart(lgaf, trunk_state, file):
    torch.save(trunk_state, file)
    before = weights.load(lgaf, file)
    assert weights.load(lgaf, file) == before
    trunk_state["bn1.bias"][0] += 1
    torch.save(trunk_state, file)
    assert weights.load(lgaf, file) != before


def renamed(state):
    return {name.replace("prelu", "relu"): tensor for name, tensor in state.items()}


def reshaped(state):
    return {**state, "fc.weight": state["fc.weight"][:, :-1]}


def with_a_trained_constant(state):
    return {**state, "features.weight": torch.full_like(state["features.weight"], 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"prelu\.weight is missing; layer1\.0\.prelu\.weight is missing; .* and 7 more"),
        (
            lambda state: {**state, "extra": torch.zeros(1)},
            r"extra is unexpected; use its configuration, or another file",
        ),
        (reshaped, r"fc\.weight has shape \(16, 255\), expected \(16, 256\)"),
        (with_a_trained_constant, r"features\.weight differs from the network's constant 1"),
    ],
)
def test_a_file_of_another_network_is_refused_as_a_whole(lgaf, trunk_state, file, change, message):
    before = {name: tensor.clone() for name, tensor in lgaf.state_dict().items()}
    torch.save(change(trunk_state), file)
    with pytest.raises(ValueError, match=rf"backbone\.weights = .*weights\.pt: .*{message}"):
        weights.load(lgaf, file)
    assert all(tensor.equal(before[name]) for name, tensor in lgaf.state_dict().items())


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a state dict written by torch.save"),
        (b"not a file of torch", "expected a state dict written by torch.save"),
        (b"hello world", "expected a state dict written by torch.save, found: ValueError"),
        (Exploit(), "expected a state dict written by torch.save"),
        ([torch.zeros(1)], "expected a dictionary of tensors by name"),
        ({"epoch": 3}, "expected a dictionary of tensors by name"),
        (None, "No such file"),
    ],
)
def test_what_is_no_state_dict_is_refused_and_never_run(lgaf, file, content, message, monkeypatch):
    monkeypatch.chdir(file.parent)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ValueError, match=rf"backbone\.weights = .*weights\.pt: .*{message}"):
        weights.load(lgaf, file)
    assert not (file.parent / "exploited").exists()
