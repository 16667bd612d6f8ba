"""`lgaf checkpoint` on a folder of checkpoints, as a user calls it."""

import json

import pytest
from typer.testing import CliRunner

from tests.trainer.checkpoint.test_directory import write
from trainer.__main__ import app
from trainer.checkpoint import directory


@pytest.fixture
def run_dir(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, config={"checkpoint": {"keep_every_steps": None}})
    return tmp_path


def call(*words):
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)])


def steps(run_dir):
    return [directory.step_of(path) for path in directory.all_of(run_dir)]


def test_ls_shows_what_is_there_and_what_is_broken(run_dir):
    (directory.final_path(run_dir, 20) / "data").write_bytes(b"short")
    done = call("ls", run_dir)
    assert done.exit_code == 0
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["10", "20", "30"]
    assert [row[4] for row in rows] == ["complete", "damaged:", "complete"]
    assert "data: expected 7 bytes, found 5" in done.stdout


def test_show_is_of_the_newest_or_the_one_named(run_dir):
    assert "step 30, written" in call("show", run_dir).stdout
    shown = call("show", directory.final_path(run_dir, 10)).stdout
    assert "step 10, written" in shown
    assert "data: 7 bytes, CRC-32 " in shown
    assert json.loads(shown.partition("configuration\n")[2]) == {"checkpoint": {"keep_every_steps": None}}


def test_verify_reads_every_byte_and_has_an_exit_code(run_dir):
    done = call("verify", run_dir)
    assert done.exit_code == 0
    assert done.stdout.count("intact") == 3
    (directory.final_path(run_dir, 20) / "data").write_bytes(b"tensorz")
    done = call("verify", run_dir)
    assert done.exit_code == 1
    assert done.stdout.count("intact") == 2
    assert "step-00000020: damaged: " in done.stdout
    assert call("verify", directory.final_path(run_dir, 30)).exit_code == 0
    assert call("verify", directory.final_path(run_dir, 20)).exit_code == 1


def test_prune_counts_only_what_it_has_read(run_dir):
    (directory.final_path(run_dir, 30) / "data").write_bytes(b"tensorz")
    done = call("prune", run_dir, "--keep", "1", "--dry-run")
    assert done.stdout == f"would remove {directory.final_path(run_dir, 10)}\n"
    assert steps(run_dir) == [10, 20, 30]
    assert call("prune", run_dir, "--keep", "1").stdout == f"removed {directory.final_path(run_dir, 10)}\n"
    assert steps(run_dir) == [20, 30]


def test_prune_leaves_what_the_run_keeps_for_ever(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step, config={"checkpoint": {"keep_every_steps": 20}})
    call("prune", tmp_path, "--keep", "1")
    assert steps(tmp_path) == [20, 40]


def test_a_folder_without_checkpoints(tmp_path):
    done = call("ls", tmp_path)
    assert "expected a run directory with checkpoints" in str(done.exception)
