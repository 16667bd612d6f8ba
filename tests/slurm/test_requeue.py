"""On a real Slurm of two nodes: a job that is told to stop is requeued and loses nothing.

Each life of a job takes about 10 s, its way back into the queue as long.
"""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "slurm/train_webface42m.sh"
DEMO = "configs/demo.toml"
STEPS = 40
JOB_TIMEOUT_S = 240
SMALL_DATA = ("identities=20", "images_per_identity=8", "held_out_identities=8", "pairs=60")
SMALL_RUN = (
    f"steps={STEPS}",
    "backbone.width=8",
    "data.image_size=48",
    "global_batch=32",
    "log_every_steps=1",
    "evaluation.sets=[]",
    "checkpoint.every_steps=1000",
    "metrics.port=0",
)
TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


def options(*values):
    return [word for value in values for word in ("--set", str(value))]


def python(*words, env=None):
    done = subprocess.run(
        (sys.executable, "-m", *map(str, words)), cwd=ROOT, env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(run_dir):
    """Return the loss by step, from the records of the trainer."""
    file = run_dir / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.fixture(scope="module")
def run_options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo"
    python("trainer", "data", "synth", folder, *options(*SMALL_DATA))
    return options(f"data.path={folder}", *SMALL_RUN)


@pytest.fixture(scope="module")
def straight(run_options, tmp_path_factory):
    """The losses of an uninterrupted run of two ranks."""
    run_dir = tmp_path_factory.mktemp("torchrun") / "run"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer")
    python(*torchrun, "train", DEMO, *run_options, *options(f"run_dir={run_dir}"))
    found = losses(run_dir)
    assert len(found) == STEPS
    return found


def wait_for_steps(cluster, run_dir, job, log):
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while len(losses(run_dir)) < 3:
        assert time.monotonic() < deadline, (
            log.read_text(),
            cluster.command("scontrol", "show", "job", str(job)),
        )
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["scancel --signal=USR1", "scontrol requeue"])
def test_the_batch_script_is_requeued_and_goes_on(how, slurm_cluster, run_options, straight, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    words = (f"--output={log}", SCRIPT, DEMO, *run_options, *options(f"run_dir={run_dir}"))
    job = slurm_cluster.submit(*TWO_RANKS, *words, cwd=ROOT)
    wait_for_steps(slurm_cluster, run_dir, job, log)
    slurm_cluster.command(*how.split(), str(job))
    ended = slurm_cluster.wait(job, JOB_TIMEOUT_S)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log.read_text()
    said = log.read_text()
    signal = "USR1" if "USR1" in how else "TERM"
    saved = re.findall(rf"SIG{signal}: saved at step (\d+); leaving with exit code 75", said)
    assert len(saved) == 1, said
    assert f"steps {saved[0]} to {STEPS}" in said
    assert said.count("the job is requeued") == (signal == "USR1")
    assert losses(run_dir) == straight


def test_a_signal_before_python_can_take_it_requeues_too(
    slurm_cluster, run_options, straight, tmp_path, monkeypatch
):
    # Python runs this first of all; once per rank, as the folder can be made once.
    early = """
        import os, signal
        try:
            os.mkdir("{}/" + os.environ["SLURM_PROCID"])
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGUSR1)
    """.replace("{}", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(early))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log, run_dir = tmp_path / "log", tmp_path / "run"
    words = (f"--output={log}", SCRIPT, DEMO, *run_options, *options(f"run_dir={run_dir}"))
    job = slurm_cluster.submit(*TWO_RANKS, *words, cwd=ROOT)
    ended = slurm_cluster.wait(job, JOB_TIMEOUT_S)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log.read_text()
    assert log.read_text().count("the job is requeued") == 1
    assert losses(run_dir) == straight


def test_a_job_of_lgaf_submit_is_requeued_and_goes_on(slurm_cluster, run_options, straight, tmp_path):
    run_dir = tmp_path / "run"
    shape = ("--nodes", 2, "--tasks-per-node", 1, "--gpus-per-node", 0, "--logs", tmp_path / "logs")
    words = (*shape, *run_options, *options(f"run_dir={run_dir}"))
    printed = python("trainer", "submit", DEMO, *words, env=slurm_cluster.env)
    job, *logs = re.match(r"job (\d+); logs.*\n  (.*)\n  (.*)\n", printed).groups()
    wait_for_steps(slurm_cluster, run_dir, job, Path(logs[1]))
    slurm_cluster.command("scancel", "--signal=USR2", job)
    ended = slurm_cluster.wait(int(job), JOB_TIMEOUT_S)
    said = "".join(Path(log).read_text() for log in logs)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), said
    assert len(re.findall(r"SIGUSR2: saved at step \d+; leaving with exit code 75", said)) == 1, said
    assert losses(run_dir) == straight


def test_a_cancelled_job_saves_and_does_not_come_back(slurm_cluster, run_options, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    words = (f"--output={log}", SCRIPT, DEMO, *run_options, *options(f"run_dir={run_dir}", "steps=100000"))
    job = slurm_cluster.submit(*TWO_RANKS, *words, cwd=ROOT)
    wait_for_steps(slurm_cluster, run_dir, job, log)
    slurm_cluster.command("scancel", str(job))
    assert slurm_cluster.wait(job, JOB_TIMEOUT_S).state == "CANCELLED", log.read_text()
    assert "the job is requeued" not in log.read_text()
    assert list((run_dir / "checkpoints").glob("step-*")), log.read_text()


def test_a_job_whose_time_limit_nears_saves_and_queues_again(slurm_cluster, run_options, tmp_path):
    # Slurm looks at limits every 30 s and signals up to 30 s early: here 30 to 60 s after the start.
    log, run_dir = tmp_path / "log", tmp_path / "run"
    limits = ("--time=2", "--signal=USR1@60", f"--output={log}")
    words = (SCRIPT, DEMO, *run_options, *options(f"run_dir={run_dir}", "steps=100000"))
    job = slurm_cluster.submit(*TWO_RANKS, *limits, *words, cwd=ROOT)
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while not (log.exists() and log.read_text().count("steps ") > 1):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    slurm_cluster.command("scancel", str(job))
    saved = re.findall(r"SIGUSR1: saved at step (\d+); leaving with exit code 75", log.read_text())
    assert f"steps {saved[0]} to 100000" in log.read_text()
