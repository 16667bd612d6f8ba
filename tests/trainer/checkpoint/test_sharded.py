"""Checkpoints as files: whole or absent, of this model or refused, and never run."""

import json
import os
import re
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from partial_fc.collectives import logical
from partial_fc.partition import class_range
from tests.ranks import run_ranks
from trainer.checkpoint import directory, sharded, storage
from trainer.checkpoint.directory import CheckpointError, Header

CLASSES = 7


def header(step):
    return Header(step, {"seed": 1}, {"images": 7}, {"torch": "0"})


def part(rank, size, fill):
    """Return the part that one rank writes."""
    return sharded.share_out(state(rank, size, fill), rank, size)


def state(rank, size, fill):
    """A replicated tensor, a buffer of integers, and seven rows over the ranks."""
    rows = class_range(CLASSES, rank, size)
    local = torch.full((len(rows), 3), float(fill)) + torch.tensor(list(rows), dtype=torch.float32)[:, None]
    return {
        "backbone_weight": {"conv.weight": torch.full((4, 2), float(fill))},
        "backbone_buffer": {"counted": torch.tensor(fill)},
        "head": {"weight": logical(local, CLASSES, dist.group.WORLD)},
    }


def latest(run_dir):
    return directory.all_of(run_dir)[-1]


def save_three(rank, run_dir):
    for step in (10, 20, 30):
        sharded.save(run_dir, part(rank, 3, step), header(step), keep=2, group=dist.group.WORLD)


def load_newest(rank, size, run_dir):
    blank = state(rank, size, 0)
    for part in blank.values():
        for tensor in part.values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()
    sharded.load(latest(run_dir), blank, group=dist.group.WORLD)
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
    assert directory.read_manifest(latest(saved)).header == header(30)


def test_any_number_of_ranks_reads_what_three_wrote(saved):
    for size in (1, 2):
        for weight, counted, rows in run_ranks(load_newest, size, size, saved):
            assert torch.equal(weight, torch.full((4, 2), 30.0))
            assert counted == 30
            assert torch.equal(rows, 30 + torch.arange(7.0)[:, None].expand(7, 3))


def newest(rank, run_dir):
    return sharded.newest(run_dir, group=dist.group.WORLD)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


FILES = ("rank-0.bin", "rank-1.bin", "rank-2.bin", "checkpoint.json")


def test_the_manifest_has_every_file_and_its_sum(saved):
    path = latest(saved)
    manifest = directory.read_manifest(path)
    assert sorted(FILES) == sorted(file.name for file in path.iterdir())
    assert {*manifest.files, "checkpoint.json"} == {*FILES}
    for name, entry in manifest.files.items():
        content = (path / name).read_bytes()
        assert entry == directory.FileSum(len(content), f"{zlib.crc32(content):08x}")


def test_every_file_is_whole_when_it_is_synced(alone, tmp_path, monkeypatch):
    synced, fsync = {}, os.fsync

    def noted(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    monkeypatch.setattr(os, "fsync", noted)
    folder = sharded.save(tmp_path, state(0, 1, 1), header(1), keep=1, group=dist.group.WORLD)
    for path in folder.iterdir():
        assert synced[path.stat().st_ino] == path.stat().st_size, path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(run_dir, alone, capfd, harm, name):
    path = latest(run_dir)
    harm(path / name)
    assert newest(0, run_dir) == path.with_name("step-00000020")
    said = capfd.readouterr().err
    where = re.escape(str(path / name))
    words = rf"lgaf: {where}: expected .*, found.*; step-00000030 is damaged and skipped\n"
    assert re.fullmatch(words, said)
    with pytest.raises(CheckpointError, match=rf"{where}: .* is damaged, use another"):
        sharded.locate(path, group=dist.group.WORLD)
    assert path.is_dir()


def test_many_ranks_find_the_damage_together_and_say_it_once(run_dir, capfd):
    path = latest(run_dir)
    for name in FILES[:3]:
        flip_a_bit(path / name)
    assert run_ranks(newest, 2, run_dir) == [path.with_name("step-00000020")] * 2
    assert capfd.readouterr().err.count("is damaged and skipped") == 1


def test_no_good_checkpoint_is_an_error_and_no_new_beginning(run_dir, alone, capfd):
    for path in directory.all_of(run_dir):
        truncate(path / "rank-1.bin")
    with pytest.raises(CheckpointError, match="expected an intact checkpoint, found 2, all damaged"):
        newest(0, run_dir)
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_folder_without_checkpoints(tmp_path, alone):
    assert newest(0, tmp_path) is None
    with pytest.raises(CheckpointError, match=r"expected a checkpoint .* or a run directory .* found none"):
        sharded.locate(tmp_path, group=dist.group.WORLD)


def test_a_save_that_fails_leaves_nothing_and_all_ranks_know(run_dir, tmp_path):
    before = directory.all_of(run_dir)
    failures = run_ranks(save_with_little_room, 3, run_dir)
    assert len(set(failures)) == 1
    assert re.search(r"step-00000040 could not be written by rank \d: .*; check the disk", failures[0])
    assert sorted((run_dir / "checkpoints").iterdir()) == before


def save_with_little_room(rank, run_dir):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        sharded.save(run_dir, part(rank, 3, 40), header(40), keep=2, group=dist.group.WORLD)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(run_dir, alone):
    truncate(latest(run_dir) / "rank-1.bin")
    sharded.save(run_dir, state(0, 1, 31), header(30), keep=2, group=dist.group.WORLD)
    assert newest(0, run_dir).name == "step-00000030"
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_what_all_hold_is_shared_out_once(alone):
    whole = {"a": {name: torch.zeros(size) for name, size in (("x", 8), ("y", 5), ("z", 4), ("w", 0))}}
    whole["head"] = {"rows": state(0, 1, 0)["head"]["weight"]}
    parts = [sharded.share_out(whole, rank, 2) for rank in range(2)]
    assert [sorted(part["a"]) for part in parts] == [["w", "x"], ["y", "z"]]
    assert all(list(part["head"]) == ["rows"] for part in parts)


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
        (of_another_name, r"fc\.weight is missing; backbone_weight\.conv\.weight is not in this model"),
    ],
)
def test_another_model_is_refused(run_dir, alone, other, message):
    with pytest.raises(
        CheckpointError, match=rf"step-00000030: expected the tensors of this model, found .*: .*{message}"
    ):
        sharded.load(latest(run_dir), other(), group=dist.group.WORLD)


def test_a_part_can_be_loaded_alone(run_dir, alone):
    part = {"backbone_weight": {"conv.weight": torch.zeros(4, 2)}}
    sharded.load(latest(run_dir), part, group=dist.group.WORLD)
    assert torch.equal(part["backbone_weight"]["conv.weight"], torch.full((4, 2), 30.0))


def test_a_truncated_part_is_named(run_dir, alone):
    path = latest(run_dir)
    truncate(path / "rank-1.bin")
    words = "step-00000030: a part of it could not be read by rank 0: EOFError: expected .* more bytes"
    with pytest.raises(CheckpointError, match=words):
        sharded.load(path, state(0, 1, 0), group=dist.group.WORLD)


def test_the_manifest_is_plain_json(saved):
    held = json.loads((latest(saved) / "checkpoint.json").read_text())
    assert {key: held[key] for key in ("step", "config", "dataset", "versions")} == {
        "step": 30,
        "config": {"seed": 1},
        "dataset": {"images": 7},
        "versions": {"torch": "0"},
    }


@pytest.mark.parametrize("nbytes", [12, 4200, 1_200_000])
def test_a_write_that_fails_anywhere_in_a_file_says_why(nbytes, tmp_path, alone):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said, tensors = [], {"head": {"rows": torch.zeros(nbytes // 12, 3)}}
    limits = [limit for limit in (0, 1, 11, 61, 999, 3999, 100_000, 1_150_000) if limit < nbytes]
    for limit in limits:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            sharded.save(tmp_path, tensors, header(1), keep=1, group=dist.group.WORLD)
        except CheckpointError as error:
            said.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == len(limits)
    assert all("by rank 0: OSError: [Errno 27] File too large; check the disk" in text for text in said)
    assert not list(directory.folder_of(tmp_path).iterdir())


DTYPES = [getattr(torch, name) for name in directory.ITEM_BYTES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 3), (0, 3), (3, 0), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_comes_back_with_the_same_bits(dtype, shape, tmp_path, alone):
    tensor = (torch.randn(shape) * 100).to(dtype)
    sharded.save(tmp_path, {"head": {"it": tensor}}, header(1), keep=1, group=dist.group.WORLD)
    blank = {"head": {"it": torch.zeros_like(tensor)}}
    sharded.load(latest(tmp_path), blank, group=dist.group.WORLD)
    assert blank["head"]["it"].dtype == dtype
    assert torch.equal(blank["head"]["it"], tensor)


def test_a_tensor_in_another_memory_format_comes_back(tmp_path, alone):
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    sharded.save(tmp_path, {"head": {"it": tensor}}, header(1), keep=1, group=dist.group.WORLD)
    blank = {"head": {"it": torch.zeros(2, 3, 4, 5)}}
    sharded.load(latest(tmp_path), blank, group=dist.group.WORLD)
    assert torch.equal(blank["head"]["it"], tensor)


def test_large_chunks_are_read_in_pieces(tmp_path, alone, monkeypatch):
    rows = torch.randn(50, 3)
    sharded.save(tmp_path, {"head": {"it": rows}}, header(1), keep=1, group=dist.group.WORLD)
    monkeypatch.setattr(storage, "_PIECE_BYTES", 100)
    blank = {"head": {"it": torch.zeros(50, 3)}}
    sharded.load(latest(tmp_path), blank, group=dist.group.WORLD)
    assert torch.equal(blank["head"]["it"], rows)


def reseal(path, change):
    """Change a manifest and correct its own checksum."""
    manifest = json.loads((path / "checkpoint.json").read_text())
    change(manifest)
    del manifest["crc32"]
    crc = zlib.crc32(json.dumps(manifest).encode())
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "crc32": f"{crc:08x}"}, indent=1) + "\n")


def outside(name):
    def change(manifest):
        manifest["files"] = {
            name if key == "rank-0.bin" else key: it for key, it in manifest["files"].items()
        }
        for tensor in manifest["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["file"] = chunk["file"].replace("rank-0.bin", name)

    return change


def chunk_with(**values):
    def change(manifest):
        manifest["tensors"]["head.weight"]["chunks"][1].update(values)

    return change


def tensor_with(**values):
    return lambda manifest: manifest["tensors"]["head.weight"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside("../step-00000020/rank-0.bin"), "invalid file name"),
        (outside("/etc/hostname"), "invalid file name"),
        (outside(".."), "invalid file name"),
        (outside("checkpoint.json"), "invalid file name"),
        (chunk_with(start=0), "expected 12 bytes per row, starting at row"),
        (chunk_with(rows=1, length=12), "rows|expected 12 bytes per row"),
        (chunk_with(length=8), "expected 12 bytes per row"),
        (chunk_with(offset=1 << 40), "beyond the end of its file"),
        (chunk_with(offset=-1), "Chunk"),
        (chunk_with(offset=1.0), "Chunk"),
        (chunk_with(file="rank-9.bin"), "rank-9"),
        (tensor_with(dtype="object"), "dtype 'object'"),
        (tensor_with(shape=[1 << 62, 1 << 62]), "expected"),
        (tensor_with(chunks=[]), "0 rows"),
        (lambda manifest: manifest.update(format=3), "one of format 3; install a newer lgaf"),
        (lambda manifest: manifest.update(tensors=[]), "items"),
        (lambda manifest: manifest.update(step="30"), "step '30'"),
        (lambda manifest: manifest.update(time_s=None), "written at None"),
        (lambda manifest: manifest.update(config=[1]), "expected tables"),
        (lambda manifest: manifest.update(cursor=[["0"]]), "cursor"),
        (lambda manifest: manifest["files"]["rank-0.bin"].update(size="x"), "size 'x'"),
        (lambda manifest: manifest["files"]["rank-0.bin"].update(crc32="\x1b[2Jaaaa"), r"CRC-32 '\\x1b"),
    ],
)
def test_a_crafted_manifest_is_refused(run_dir, alone, change, message):
    path = latest(run_dir)
    reseal(path, lambda manifest: None)
    assert directory.damage(path) is None
    reseal(path, change)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json: expected a .*manifest, found .*{message}"):
        sharded.load(path, state(0, 1, 0), group=dist.group.WORLD)
    assert "checkpoint.json: expected a checkpoint's manifest" in directory.damage(path)


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_only_regular_files_are_opened(run_dir, alone, tmp_path, kind):
    path = latest(run_dir)
    victim, elsewhere = path / "rank-1.bin", tmp_path / "elsewhere"
    victim.rename(elsewhere)
    if kind == "link":
        victim.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(victim)
    elif kind == "device":
        victim.symlink_to("/dev/zero")
    else:
        victim.mkdir()
    assert re.search(r"rank-1\.bin: expected ", directory.damage(path))
    with pytest.raises(CheckpointError, match="a part of it could not be read"):
        sharded.load(path, state(0, 1, 0), group=dist.group.WORLD)


def test_a_deeply_nested_manifest_is_damaged_and_no_traceback(run_dir, alone):
    path = latest(run_dir)
    text = (path / "checkpoint.json").read_text()
    for depth in (600, 100_000):
        nested = "[" * depth + "]" * depth
        (path / "checkpoint.json").write_text(text.replace('"seed": 1', f'"seed": {nested}'))
        assert "checkpoint.json: expected a checkpoint's manifest, found" in directory.damage(path)
    assert newest(0, run_dir).name == "step-00000020"


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_manifest_that_is_no_regular_file_is_not_opened(run_dir, alone, kind):
    manifest = latest(run_dir) / "checkpoint.json"
    manifest.unlink()
    if kind == "pipe":
        os.mkfifo(manifest)
    else:
        manifest.symlink_to("/dev/zero")
    assert "checkpoint.json: expected a checkpoint's manifest, found" in directory.damage(manifest.parent)
    assert newest(0, run_dir).name == "step-00000020"
