"""Two trainings never write to one run directory, and the lock of a dead one does not stop the next."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.formats.pair_file import write_pairs
from data_pipeline.formats.recordio_writer import FlatWriter
from tests.trainer.conftest import run, train_words
from trainer.runtime import run_lock
from trainer.runtime.run_lock import Holder, held

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from trainer.runtime.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.01)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def elsewhere(**changes):
    """The description of a process on another machine."""
    return dataclasses.replace(Holder.here(), host="node7", machine="another boot", **changes)


def plant(folder, holder, age_s=0.0):
    path = folder / "run.lock"
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    now_s = path.stat().st_mtime
    os.utime(path, (now_s - age_s, now_s - age_s))
    return path


def takes(folder):
    """Take the lock, watching another one for the shortest time."""
    return held(folder, renew_s=0.02, silent_s=0.1)


def test_the_lock_names_its_holder_and_is_removed_at_the_end(tmp_path):
    with held(tmp_path / "new" / "run"):
        found = json.loads((tmp_path / "new" / "run" / "run.lock").read_text())
        assert (found["process"], found["host"]) == (os.getpid(), os.uname().nodename)
        assert os.listdir(tmp_path / "new" / "run") == ["run.lock"]
    assert os.listdir(tmp_path / "new" / "run") == []


def test_a_second_training_is_refused(tmp_path):
    with held(tmp_path):
        before = (tmp_path / "run.lock").read_text()
        with (
            pytest.raises(
                ValueError,
                match=rf"run\.lock: expected no other training .*, found one: process {os.getpid()} on .*, "
                r"since .*; wait until it ends, set another run_dir, or, .* remove this file",
            ),
            held(tmp_path),
        ):
            pass
        assert (tmp_path / "run.lock").read_text() == before
        assert os.listdir(tmp_path) == ["run.lock"]


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_at_once(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"found one: process {process.pid} on"), held(tmp_path):
            pass
        process.kill()
    assert (tmp_path / "run.lock").exists()
    with held(tmp_path, silent_s=1000):
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()


def test_the_number_of_a_dead_process_may_be_used_again(tmp_path):
    here = Holder.here()
    plant(tmp_path, dataclasses.replace(here, process_start=here.process_start - 1))
    with held(tmp_path, silent_s=1000):
        pass


def test_a_holder_on_another_machine_that_renews_is_refused(tmp_path):
    path = plant(tmp_path, elsewhere(job="17"))
    is_over = threading.Event()

    def renew():
        with open(path, "r+b") as file:
            run_lock._renew(file.fileno(), is_over, 0.01)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(ValueError, match=r"on node7, job 17, since"), held(tmp_path, renew_s=0.05):
            pass
    finally:
        is_over.set()
        renewing.join()
    assert "node7" in path.read_text()


def test_a_holder_on_another_machine_that_is_silent_is_replaced(tmp_path, capfd):
    plant(tmp_path, elsewhere())
    with takes(tmp_path):
        pass
    assert f"run.lock is of process {os.getpid()} on node7" in capfd.readouterr().err


def test_one_that_has_been_silent_for_long_is_not_watched(tmp_path, monkeypatch):
    plant(tmp_path, elsewhere(), age_s=3600)
    monkeypatch.setattr("time.sleep", lambda seconds: None if seconds < 1 else pytest.fail("waited"))
    with held(tmp_path):
        pass


def test_a_requeued_job_takes_over_and_another_step_of_the_same_start_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    plant(tmp_path, elsewhere(job="17", restart="0"))
    with held(tmp_path, silent_s=1000):
        pass
    path = plant(tmp_path, elsewhere(job="17", restart="1"))
    monkeypatch.setattr("time.sleep", lambda seconds: os.utime(path))
    with pytest.raises(ValueError, match=r"on node7, job 17"), held(tmp_path):
        pass


def test_a_lock_that_is_released_while_it_is_watched_is_taken(tmp_path, monkeypatch):
    path = plant(tmp_path, elsewhere())
    monkeypatch.setattr("time.sleep", lambda seconds: path.unlink(missing_ok=True))
    with held(tmp_path, silent_s=1000):
        assert "node7" not in path.read_text()


def test_of_two_that_take_over_at_once_one_is_refused(tmp_path, monkeypatch):
    path = plant(tmp_path, elsewhere(), age_s=3600)
    monkeypatch.setattr("time.sleep", lambda seconds: plant(tmp_path, elsewhere(token="another")))
    with pytest.raises(ValueError, match=r"found one: process .* on node7"), held(tmp_path):
        pass
    assert json.loads(path.read_text())["token"] == "another"


def test_a_lock_that_was_taken_over_is_not_removed_at_the_end(tmp_path):
    with held(tmp_path):
        plant(tmp_path, elsewhere())
    assert "node7" in (tmp_path / "run.lock").read_text()


def test_file_systems_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with held(tmp_path), pytest.raises(ValueError, match=r"found one: process"), held(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", 100_000 * b"[", b'{"host": 10000000000000000000000}', b"\xff", b"\x1b[2J"],
)
def test_a_damaged_lock_is_watched_and_then_replaced(tmp_path, content, capfd):
    (tmp_path / "run.lock").write_bytes(content)
    with takes(tmp_path):
        pass
    assert "run.lock is of an unknown process; it is watched" in capfd.readouterr().err


def test_a_name_that_a_terminal_would_obey_is_not_shown(tmp_path, capfd):
    plant(tmp_path, dataclasses.replace(elsewhere(), host="\x1b[2J"))
    with takes(tmp_path):
        pass
    assert "\x1b" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "link", "endless", "dangling"])
def test_a_lock_that_is_no_regular_file_is_neither_read_nor_followed(tmp_path, kind):
    victim, lock = tmp_path / "victim", tmp_path / "run" / "run.lock"
    lock.parent.mkdir()
    victim.write_text("the victim's file")
    targets = {"link": victim, "endless": "/dev/zero", "dangling": tmp_path / "missing"}
    os.mkfifo(lock) if kind == "pipe" else lock.symlink_to(targets[kind])
    with takes(lock.parent):
        assert not lock.is_symlink()
    assert victim.read_text() == "the victim's file"
    assert not (tmp_path / "missing").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ValueError, match=r"run_dir .*file/run: expected a folder that can be written, found: "
        ),
        held(tmp_path / "file" / "run"),
    ):
        pass


def test_all_ranks_of_a_second_training_end_with_one_message(tmp_path):
    with FlatWriter(tmp_path / "faces", image_size=(48, 48)) as writer:
        for label in range(4):
            writer.add(b"never decoded", label)
    write_pairs(tmp_path / "faces" / "held_out.bin", [b"never decoded"] * 40, [True, False] * 10)
    words = train_words(tmp_path / "run", tmp_path / "faces", "steps=4")
    with held(tmp_path / "run"):
        done = run(*words, ranks=2)
        assert done.returncode != 0
        assert done.stderr.count("expected no other training in this run directory") == 1
        assert os.listdir(tmp_path / "run") == ["run.lock"]
