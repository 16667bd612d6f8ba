"""Output files: a planted link does not lead elsewhere, and of two writers none leaves a mixture."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.common.atomic_write import locked, open_to_append, private_file, staged, staged_file
from data_pipeline.formats.int64_labels import write_labels
from data_pipeline.formats.pair_file import write_pairs
from data_pipeline.formats.recordio import RecordWriter
from data_pipeline.formats.recordio_writer import FlatWriter
from data_pipeline.formats.tar_writer import ShardWriter
from data_pipeline.quarantine import BadRecord, Quarantine
from tests.conftest import require_root
from trainer import backbones
from trainer.inference import network
from trainer.inference.export import export
from trainer.monitoring.metrics_log import MetricsLog, write_result
from trainer.report.page import write_text

ROOT = Path(__file__).parents[2]
SECRET = "the victim's file\n"


def a_network():
    config = backbones.parse({"name": "iresnet", "depth": 18, "embedding_size": 8})
    return network.Network(backbones.build(config, 112).eval(), config, 112, 5)


def records(folder):
    with RecordWriter(folder / "train.rec") as writer:
        writer.write(0, b"record")


def dataset(folder):
    with FlatWriter(folder, image_size=(112, 112)) as writer:
        writer.add(b"image", 1 << 40)


def shards(folder):
    with ShardWriter(folder) as writer:
        writer.add(b"image", 1)


WRITERS = {
    "metrics.jsonl": lambda folder: MetricsLog(folder, 0).write("train", 1, loss=1.0),
    "result.json": lambda folder: write_result(folder, {"steps": 1}),
    "report.html": lambda folder: write_text(folder / "report.html", "<p>"),
    "net.pt": lambda folder: network.write_pt(a_network(), folder / "net.pt"),
    "net.safetensors": lambda folder: export(a_network(), folder / "net.safetensors"),
    "train.labels.npy": lambda folder: write_labels(folder / "train.rec", np.arange(2), np.arange(2)),
    "held_out.bin": lambda folder: write_pairs(folder / "held_out.bin", [b"a", b"b"], [True]),
    "train.rec": records,
    "train.idx": records,
    "property": dataset,
    "train-000000.tar": shards,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_at_the_name_of_an_output_or_at_its_old_temporary_name_is_not_followed(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text(SECRET)
    folder.mkdir()
    stem, suffix = Path(name).stem, Path(name).suffix
    planted = {name, f"{name}.part", f".{name}.part", f".{stem}.part{suffix}"}
    for link in planted:
        (folder / link).symlink_to(victim)
    WRITERS[name](folder)
    assert victim.read_text() == SECRET
    assert not (folder / name).is_symlink()
    assert (folder / name).stat().st_size > 0
    assert all((folder / link).is_symlink() for link in planted - {name})


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_log_is_not_appended_to_the_target_of_a_link_or_to_a_pipe(tmp_path, capfd, kind):
    victim, listed = tmp_path / "victim", tmp_path / "quarantine.jsonl"
    victim.write_text(SECRET)
    listed.symlink_to(victim) if kind == "link" else os.mkfifo(listed)
    with pytest.raises(OSError, match=r"quarantine\.jsonl: expected a regular file to append to, found a li"):
        open_to_append(listed)
    Quarantine(listed, 0.1).add(1, BadRecord("f", 1, 0, "bad"))
    assert "expected a regular file to append to" in capfd.readouterr().err
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("planted", [".set.part", ".set.0123456789abcdef.part"])
def test_a_planted_link_does_not_empty_a_folder_elsewhere(tmp_path, planted):
    victim = tmp_path / "victim" / "data.txt"
    victim.parent.mkdir()
    victim.write_text(SECRET)
    (tmp_path / planted).symlink_to(victim.parent)
    with staged(tmp_path / "set") as partial:
        (partial / "file").touch()
    assert victim.read_text() == SECRET
    assert (tmp_path / "set" / "file").exists()


@pytest.mark.parametrize("kind", [staged_file, private_file])
def test_a_temporary_file_has_a_random_name_and_the_usual_mode(tmp_path, kind):
    names = set()
    for _ in range(2):
        with kind(tmp_path / "out.txt") as partial:
            names.add(partial.name)
            partial.write_text("x")
    assert len(names) == 2
    (tmp_path / "usual.txt").touch()
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode
    with staged(tmp_path / "folder") as partial:
        assert partial.name.startswith(".folder.")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "usual").stat().st_mode


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.common.atomic_write import staged, staged_file
with staged(Path(sys.argv[1]) / "folder") as folder, staged_file(Path(sys.argv[1]) / "out.txt") as file:
    (folder / "half").touch()
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert len(os.listdir(tmp_path)) == 2
    (tmp_path / ".out.part.txt").touch()  # the user's
    with staged_file(tmp_path / "out.txt") as file, staged(tmp_path / "folder"):
        file.write_text("complete")
    assert sorted(os.listdir(tmp_path)) == [".out.part.txt", "folder", "out.txt"]


def test_of_two_writers_of_a_file_the_last_wins(tmp_path):
    out = tmp_path / "net.pt"
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        files = [stack.enter_context(staged_file(out)) for stack in (first, second)]
        assert files[0] != files[1]
        for at in range(100):
            for file, text in zip(files, ("A", "B"), strict=True):
                with open(file, "a") as opened:
                    opened.write(text if at else text.lower())
        second.close()
        assert out.read_text() == "b" + 99 * "B"
        first.close()
    assert out.read_text() == "a" + 99 * "A"
    assert os.listdir(tmp_path) == ["net.pt"]


def test_two_extractions_to_one_file_leave_one_network(tmp_path):
    out = tmp_path / "net.pt"
    networks = [a_network()._replace(step=step) for step in (1, 2)]
    together = threading.Barrier(2)

    def extract(one):
        for _ in range(3):
            together.wait()
            network.write_pt(one, out)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(extract, networks))
    found = network.read_network(out)
    expected = networks[found.step - 1].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())
    assert os.listdir(tmp_path) == ["net.pt"]


def test_of_two_writers_of_a_folder_the_second_is_refused(tmp_path):
    with staged(tmp_path / "set") as partial:
        with pytest.raises(ValueError, match=r"set: another process is writing it"), staged(tmp_path / "set"):
            pass
        (partial / "file").touch()
    assert os.listdir(tmp_path) == ["set"]


def test_an_output_that_is_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(ValueError, match=r"expected a file to write .*, found a pipe or device"):
        write_text(tmp_path / "results.json", json.dumps({}))
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=r"another process is writing it"),
        locked(tmp_path),
    ):
        pass


def test_a_link_of_another_user_at_an_output_folder_is_not_followed(tmp_path):
    require_root("giving a link to another user")
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "elsewhere")
    os.lchown(link, 12345, 12345)
    with (
        pytest.raises(ValueError, match="out: expected your own folder, found another user's link"),
        staged(link),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()
