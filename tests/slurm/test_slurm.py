"""Training on a real Slurm of two nodes gives the losses that torchrun gives on one machine.

Takes 25 s and the time of three short trainings.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train_webface42m.sh"
DEMO = "configs/demo.toml"
STEPS = 6
JOB_TIMEOUT_S = 240
TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


def lgaf(*words, env=None):
    """Run a command of `lgaf` in the repository's root."""
    command = (sys.executable, "-m", "trainer", *map(str, words))
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)


def losses(run_dir):
    """Return the loss by step, from the records of the trainer."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo"
    small = ("identities=20", "images_per_identity=8", "held_out_identities=8", "pairs=60")
    done = lgaf("data", "synth", folder, *(word for value in small for word in ("--set", value)))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def overrides(dataset):
    """`--set` options of the few steps that every run here makes; the folder of the run comes on top."""
    return ["--set", f"data.path={dataset}", "--set", f"steps={STEPS}"]


@pytest.fixture(scope="module")
def torchrun_losses(overrides, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("torchrun") / "run"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = (*torchrun, "-m", "trainer", "train", DEMO, *overrides, "--set", f"run_dir={run_dir}")
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = losses(run_dir)
    assert len(found) == STEPS
    return found


def test_the_batch_script_gives_the_losses_of_torchrun(slurm_cluster, overrides, torchrun_losses, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    arguments = (DEMO, *overrides, "--set", f"run_dir={run_dir}")
    job = slurm_cluster.submit(
        *TWO_RANKS, f"--output={log}", "slurm/train_webface42m.sh", *arguments, cwd=ROOT
    )
    ended = slurm_cluster.wait(job, JOB_TIMEOUT_S)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log.read_text()
    assert losses(run_dir) == torchrun_losses


def test_lgaf_submit_gives_the_losses_of_torchrun(slurm_cluster, overrides, torchrun_losses, tmp_path):
    run_dir = tmp_path / "run"
    shape = ("--nodes", 2, "--tasks-per-node", 1, "--gpus-per-node", 0, "--logs", tmp_path / "logs")
    done = lgaf("submit", DEMO, *shape, *overrides, "--set", f"run_dir={run_dir}", env=slurm_cluster.env)
    assert done.returncode == 0, done.stderr
    printed = re.match(r"job (\d+); logs.*\n  (.*)\n  (.*)\n", done.stdout)
    ended = slurm_cluster.wait(int(printed[1]), JOB_TIMEOUT_S)
    log = "".join(Path(path).read_text() for path in printed.groups()[1:])
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log
    assert losses(run_dir) == torchrun_losses
    # The overrides in it may contain credentials.
    (pickled,) = (tmp_path / "logs").rglob("*_submitted.pkl")
    assert pickled.stat().st_mode & 0o077 == 0


def test_a_job_that_fails_says_why_once(slurm_cluster, tmp_path):
    log = tmp_path / "log"
    script = ("slurm/train_webface42m.sh", DEMO, "--set", "stepz=3")
    job = slurm_cluster.submit(*TWO_RANKS, f"--output={log}", *script, cwd=ROOT)
    ended = slurm_cluster.wait(job, JOB_TIMEOUT_S)
    assert ended.state == "FAILED"
    assert ended.exit_code != 0
    assert log.read_text().count("stepz") == 1, log.read_text()


def test_lgaf_submit_waits_and_fails_with_the_job(slurm_cluster, tmp_path):
    shape = ("--nodes", 2, "--tasks-per-node", 1, "--gpus-per-node", 0, "--logs", tmp_path / "logs")
    done = lgaf("submit", DEMO, *shape, "--wait", "--set", "data.path=/nowhere", env=slurm_cluster.env)
    assert done.returncode == 1
    assert re.search(r"job \d+: FAILED\n", done.stdout), done.stdout + done.stderr
    error_log = Path(done.stdout.splitlines()[2].strip())
    logs = error_log.parent.glob("*_log.err")
    assert sum(log.read_text().count("no dataset at /nowhere") for log in logs) == 1


def test_lgaf_submit_finds_a_mistake_in_the_configuration_before_it_queues(slurm_cluster, tmp_path):
    shape = ("--nodes", 2, "--tasks-per-node", 1, "--gpus-per-node", 0, "--logs", tmp_path / "logs")
    done = lgaf("submit", DEMO, *shape, "--set", "stepz=3", env=slurm_cluster.env)
    assert done.returncode == 1
    assert "unknown key stepz; did you mean steps?" in done.stderr
    assert not (tmp_path / "logs").exists()


def test_lgaf_submit_repeats_what_sbatch_refused(slurm_cluster, tmp_path):
    shape = ("--nodes", 2, "--tasks-per-node", 8, "--logs", tmp_path / "logs")
    done = lgaf("submit", DEMO, *shape, env=slurm_cluster.env)
    assert done.returncode != 0
    assert "generic resource" in done.stderr
    assert "'gpus_per_node': 8" in done.stderr


@pytest.mark.parametrize(
    ("folder", "arguments", "message"),
    [
        (ROOT, ["configs/absent.toml"], f"found no configs/absent.toml in {ROOT}"),
        (ROOT / "tests", [], f"repository's root, found {ROOT / 'tests'}"),
    ],
)
def test_the_batch_script_says_what_it_misses(slurm_cluster, tmp_path, folder, arguments, message):
    log = tmp_path / "log"
    job = slurm_cluster.submit(*TWO_RANKS, f"--output={log}", SCRIPT, *arguments, cwd=folder)
    assert slurm_cluster.wait(job, JOB_TIMEOUT_S).exit_code == 2
    assert log.read_text().count(message) == 1


def test_the_folder_of_the_batch_script_s_log_comes_with_the_repository():
    # Slurm does not make it, and a job whose log cannot be opened fails without a word.
    output = re.search(r"^#SBATCH --output=(.*)$", SCRIPT.read_text(), re.MULTILINE)[1]
    assert (ROOT / output).with_name(".gitkeep").is_file()
