"""Checkpoints as files: whole or absent, of this model or refused, and never run."""

import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist

from partial_fc.collectives import logical
from partial_fc.partition import class_range
from tests.ranks import run_ranks
from trainer import checkpoint
from trainer.checkpoint import CheckpointError, Header

CLASSES = 7


def header(step):
    return Header(step, {"seed": 1}, {"images": 7}, {"torch": "0"})


def state(rank, size, fill):
    """A replicated tensor, a buffer of integers, and seven rows over the ranks."""
    rows = class_range(CLASSES, rank, size)
    local = torch.full((len(rows), 3), float(fill)) + torch.tensor(list(rows), dtype=torch.float32)[:, None]
    return {
        "backbone_weight": {"conv.weight": torch.full((4, 2), float(fill))},
        "backbone_buffer": {"counted": torch.tensor(fill)},
        "head": {"weight": logical(local, CLASSES, dist.group.WORLD)},
    }


def save_three(rank, run_dir):
    for step in (10, 20, 30):
        checkpoint.save(run_dir, state(rank, 3, step), header(step), keep=2, group=dist.group.WORLD)


def load_newest(rank, size, run_dir):
    blank = state(rank, size, 0)
    for part in blank.values():
        for tensor in part.values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()
    checkpoint.load(checkpoint.newest(run_dir), blank, group=dist.group.WORLD)
    return (
        blank["backbone_weight"]["conv.weight"],
        blank["backbone_buffer"]["counted"],
        blank["head"]["weight"].full_tensor(),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(save_three, 3, run_dir)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_newest_are_kept_and_nothing_else_is_there(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000030",
    ]
    assert checkpoint.read_header(checkpoint.newest(saved)) == header(30)


def test_any_number_of_ranks_reads_what_three_wrote(saved):
    for size in (1, 2):
        for weight, counted, rows in run_ranks(load_newest, size, size, saved):
            assert torch.equal(weight, torch.full((4, 2), 30.0))
            assert counted == 30
            assert torch.equal(rows, 30 + torch.arange(7.0)[:, None].expand(7, 3))


def test_an_unfinished_checkpoint_does_not_count(run_dir):
    newest = checkpoint.newest(run_dir)
    (newest / "checkpoint.json").unlink()
    assert checkpoint.newest(run_dir).name == "step-00000020"
    newest.rename(newest.with_name(".step-00000040.part"))
    assert checkpoint.newest(run_dir).name == "step-00000020"


def test_a_folder_without_checkpoints(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"expected a checkpoint .* or a run directory .* found none"):
        checkpoint.locate(tmp_path)


def test_a_damaged_header_is_named(run_dir):
    path = checkpoint.newest(run_dir)
    (path / "checkpoint.json").write_text('{"step": 3')
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: expected a checkpoint's header, found"):
        checkpoint.read_header(path)


def of_another_shape():
    other = state(0, 1, 0)
    other["backbone_weight"] = {"conv.weight": torch.zeros(4, 3)}
    return other


def of_another_name():
    other = state(0, 1, 0)
    other["backbone_weight"] = {"fc.weight": torch.zeros(4, 2)}
    return other


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (of_another_shape, r"conv\.weight has shape \(4, 2\), expected \(4, 3\)"),
        (of_another_name, r"fc\.weight is missing; backbone_weight\.conv\.weight is not of this model"),
    ],
)
def test_another_model_is_refused(run_dir, alone, other, message):
    with pytest.raises(CheckpointError, match=rf"step-00000030 is of another model: .*{message}"):
        checkpoint.load(checkpoint.newest(run_dir), other(), group=dist.group.WORLD)


def test_a_part_can_be_loaded_alone(run_dir, alone):
    part = {"backbone_weight": {"conv.weight": torch.zeros(4, 2)}}
    checkpoint.load(checkpoint.newest(run_dir), part, group=dist.group.WORLD)
    assert torch.equal(part["backbone_weight"]["conv.weight"], torch.full((4, 2), 30.0))


def test_a_truncated_part_is_named(run_dir, alone):
    path = checkpoint.newest(run_dir)
    for part in path.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="step-00000030: a part of it cannot be read"):
        checkpoint.load(path, state(0, 1, 0), group=dist.group.WORLD)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_metadata_that_would_run_code_is_refused(run_dir, alone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.newest(run_dir)
    (path / ".metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match=r"\.metadata: .* forbidden global (posix|os)\.system"):
        checkpoint.load(path, state(0, 1, 0), group=dist.group.WORLD)
    assert not (tmp_path / "exploited").exists()


def test_a_tensor_that_would_run_code_is_refused(run_dir, alone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.newest(run_dir)
    for part in path.glob("*.distcp"):
        torch.save(Exploit(), part)
    with pytest.raises(CheckpointError, match="a part of it cannot be read"):
        checkpoint.load(path, state(0, 1, 0), group=dist.group.WORLD)
    assert not (tmp_path / "exploited").exists()


def test_the_header_is_plain_json(saved):
    held = json.loads((checkpoint.newest(saved) / "checkpoint.json").read_text())
    assert held == {"step": 30, "config": {"seed": 1}, "dataset": {"images": 7}, "versions": {"torch": "0"}}
