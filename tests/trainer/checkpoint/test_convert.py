"""Checkpoints of format 1: converted without executing their pickles, and refused before conversion."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from tests.trainer.conftest import environment, losses, run, train_words
from tests.trainer.processes import state_of
from trainer.checkpoint import convert as checkpoint_convert
from trainer.checkpoint import directory
from trainer.checkpoint.directory import CheckpointError, FileSum, Manifest

WRITTEN = sorted(Path(__file__).with_name("format_1").glob("*.zip"))
COMMON = ("steps=4", "checkpoint.every_steps=2", "log_every_steps=1")


@pytest.mark.parametrize("archive", WRITTEN, ids=lambda path: path.stem)
def test_what_torch_wrote_under_any_python_is_rewritten(archive, tmp_path):
    shutil.unpack_archive(archive, tmp_path / "checkpoints")
    [checkpoint] = directory.all_of(tmp_path)
    header = directory.read_manifest(checkpoint).header
    assert directory.damage(checkpoint) is None
    checkpoint_convert.convert(checkpoint)
    assert directory.damage(checkpoint) is None
    assert directory.read_manifest(checkpoint).header == header
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "checkpoint.json",
        "rank-0.bin",
        "rank-1.bin",
    ]
    rows = torch.arange(21.0).reshape(7, 3)
    expected = {
        "backbone_weight.conv.weight": torch.arange(8.0).reshape(4, 2),
        "backbone_buffer.counted": torch.tensor(30),
        "head.weight": rows,
        "head.momentum": rows.bfloat16(),
    }
    found = state_of(checkpoint)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in expected.items()
    )


def seal_as_format_1(checkpoint):
    """Write the manifest of an older lgaf over the files that are in a folder."""
    header = directory.read_manifest(checkpoint).header
    contents = {
        path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != directory.MANIFEST
    }
    sums = {name: FileSum(len(text), f"{zlib.crc32(text):08x}") for name, text in contents.items()}
    text = directory._sealed(Manifest(header, time.time(), sums, {}, 1))
    (checkpoint / directory.MANIFEST).write_text(text)


@pytest.fixture(scope="module")
def straight(faces, tmp_path_factory):
    """A run of four steps with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = run(*train_words(run_dir, faces, *COMMON))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def old_run(straight, tmp_path):
    """The run after two steps, with its checkpoint as torch's own writer left it."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    newest, checkpoint = directory.final_path(run_dir, 4), directory.final_path(run_dir, 2)
    shutil.rmtree(newest)
    state = state_of(checkpoint)
    (checkpoint / "rank-0.bin").unlink()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(checkpoint))
    dist.destroy_process_group()
    seal_as_format_1(checkpoint)
    return run_dir


@pytest.fixture
def words(faces):
    """The words of every command that reads a checkpoint, by the run directory."""

    def words(run_dir):
        out, image = run_dir.parent, next(faces.parent.rglob("*.bin"))
        return {
            "extract": ["checkpoint", "extract", run_dir, "--out", out / "n.pt"],
            "eval": ["eval", run_dir, "--pairs", image],
            "export": ["export", run_dir, "--out", out / "n.safetensors"],
            "embed": ["embed", out, "--checkpoint", run_dir, "--out", out / "e.npz"],
            "compare": ["compare", image, image, "--checkpoint", run_dir],
            "train": train_words(run_dir, faces, *COMMON),
        }

    return words


# One start of Python and torch for all commands, each of which ends its process.
FORKING = """
    import json, os, sys
    import torch, trainer.inference.network
    from trainer.__main__ import main
    for name, words in json.loads(sys.argv[1]).items():
        print("==", name, file=sys.stderr, flush=True)
        pid = os.fork()
        if pid == 0:
            sys.argv = ["lgaf", *words]
            main()
            os._exit(0)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=sys.stderr, flush=True)
"""


def said_by_each(words, folder):
    """Exit code and standard error of each command."""
    plain = {name: list(map(str, command)) for name, command in words.items()}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), json.dumps(plain)],
        env=environment(),
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=240,
    )
    parts = [part.partition("\n") for part in done.stderr.split("== ")[1:]]
    outcomes = {name: text.rpartition("exit ") for name, _, text in parts}
    assert outcomes.keys() == plain.keys(), done.stderr
    return {name: (int(code), text) for name, (text, _, code) in outcomes.items()}


def test_a_run_of_an_older_lgaf_goes_on_after_one_command(old_run, words, straight, faces, tmp_path):
    for name, (code, text) in said_by_each(words(old_run), tmp_path).items():
        assert code == 1, name
        assert f"expected format {directory.FORMAT}, found 1, which an older lgaf wrote; convert it" in text
    done = run("checkpoint", "convert", old_run)
    assert done.stdout == "step-00000002: converted\n"
    assert run("checkpoint", "convert", old_run).stdout == "step-00000002: has the current format already\n"
    done = run(*train_words(old_run, faces, *COMMON))
    assert done.returncode == 0, done.stderr
    assert "steps 2 to 4" in done.stderr
    assert losses(old_run) == losses(straight)


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def poisoned(kind, marker):
    """The bytes of a `.metadata` that runs code where it is unpickled, or that leads torch to where it is."""
    if kind == "reduce":
        return pickle.dumps(Exploit(marker))
    if kind == "getattr":
        # getattr(getattr, "__self__") is the module builtins, whose exec is called then.
        named = b"cbuiltins\ngetattr\n"
        code = f"import os; os.mkdir({str(marker)!r})".encode()
        module = named + b"(" + named + b"V__self__\ntR"
        return named + b"(" + module + b"Vexec\ntR(V" + code + b"\ntR."
    if kind == "field":
        return pickle.dumps(Metadata({}, planner_data=Exploit(marker), storage_data={}))
    assert kind == "bytes"
    # torch reads an entry of bytes by torch.load(weights_only=False).
    name = "backbone_weight.conv"
    info = dcp.filesystem._StorageInfo("__0_0.distcp", 0, 10)
    return pickle.dumps(
        Metadata({name: BytesStorageMetadata()}, storage_data={MetadataIndex(name, torch.Size(())): info})
    )


@pytest.mark.parametrize("kind", ["reduce", "getattr", "field", "bytes"])
def test_a_crafted_checkpoint_of_format_1_runs_nothing(old_run, kind, tmp_path):
    marker, checkpoint = tmp_path / "exploited", directory.final_path(old_run, 2)
    (checkpoint / ".metadata").write_bytes(poisoned(kind, marker))
    torch.save(Exploit(marker), checkpoint / "__0_0.distcp")
    seal_as_format_1(checkpoint)
    before = sorted(checkpoint.iterdir())
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of format 1 as torch writes it, found"):
        checkpoint_convert.convert(checkpoint)
    assert sorted(checkpoint.iterdir()) == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert not marker.exists()
    # It is the reader that keeps it from running.
    if kind == "bytes":
        torch.load(checkpoint / "__0_0.distcp", weights_only=False)
    else:
        pickle.loads((checkpoint / ".metadata").read_bytes())
    assert marker.exists()


def test_a_crafted_tensor_of_format_1_runs_nothing(old_run, tmp_path):
    marker, checkpoint = tmp_path / "exploited", directory.final_path(old_run, 2)
    archive = checkpoint / "__0_0.distcp"
    size = archive.stat().st_size
    torch.save(Exploit(marker), archive)
    archive.write_bytes(archive.read_bytes().ljust(size, b"\0"))
    seal_as_format_1(checkpoint)
    with pytest.raises(CheckpointError, match="expected a checkpoint of format 1"):
        checkpoint_convert.convert(checkpoint)
    assert not marker.exists()


def test_no_command_runs_what_a_crafted_checkpoint_names(straight, old_run, words, tmp_path):
    marker = tmp_path / "exploited"
    checkpoint = directory.final_path(old_run, 2)
    (checkpoint / ".metadata").write_bytes(poisoned("bytes", marker))
    torch.save(Exploit(marker), checkpoint / "__0_0.distcp")
    seal_as_format_1(checkpoint)
    outcomes = said_by_each(words(old_run), tmp_path)
    # And one of the present format, with a pickle in the place of a tensor's bytes.
    shutil.rmtree(checkpoint)
    shutil.copytree(directory.final_path(straight, 2), checkpoint)
    content = (checkpoint / "rank-0.bin").read_bytes()
    torch.save(Exploit(marker), checkpoint / "rank-0.bin")
    archive = (checkpoint / "rank-0.bin").read_bytes()
    (checkpoint / "rank-0.bin").write_bytes(archive + content[len(archive) :])
    (checkpoint / ".metadata").write_bytes(poisoned("reduce", marker))
    manifest = directory.read_manifest(checkpoint)
    manifest.files["rank-0.bin"] = FileSum.of(checkpoint / "rank-0.bin")
    (checkpoint / directory.MANIFEST).write_text(directory._sealed(manifest))
    assert directory.damage(checkpoint) is None
    said = said_by_each(words(old_run), tmp_path)
    for name, (code, text) in outcomes.items():
        assert code == 1, (name, text)
        assert text.count("lgaf: ") == 1, (name, text)
    # Bytes are numbers, whatever they mean to others.
    assert said["extract"][0] == 0
    assert not marker.exists()


def test_a_checkpoint_without_room_to_rewrite_stays(old_run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    checkpoint = directory.final_path(old_run, 2)
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    monkeypatch.setattr(directory, "publish", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint_convert.convert(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_conversion_that_was_killed_between_its_renames_is_restored(old_run):
    checkpoint = directory.final_path(old_run, 2)
    checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old"))
    done = run("checkpoint", "convert", checkpoint)
    assert done.stdout == "step-00000002: converted\n", done.stderr
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_one_that_cannot_be_converted_does_not_keep_others_from_it(old_run, tmp_path):
    checkpoint = directory.final_path(old_run, 2)
    damaged = shutil.copytree(checkpoint, directory.final_path(old_run, 1))
    (damaged / "__0_0.distcp").write_bytes(b"damaged")
    done = run("checkpoint", "convert", old_run)
    assert done.returncode == 1
    assert done.stdout == "step-00000002: converted\n"
    assert "step-00000001: not converted: " in done.stderr
    assert directory.damage(checkpoint) is None
