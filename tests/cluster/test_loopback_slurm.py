"""The cluster that other tests run on is a real one, and leaves nothing behind. About 5 s."""

import time
from pathlib import Path

import pytest

from tests.cluster.loopback_slurm import ClusterError, LoopbackSlurm
from tests.conftest import require_root

HOSTS = Path("/etc/hosts")


@pytest.fixture(scope="module", autouse=True)
def _as_root():
    require_root("a Slurm on loopback")


@pytest.fixture(scope="module")
def cluster():
    with LoopbackSlurm() as running:
        yield running


def processes_in(namespaces):
    """Numbers of the machine's processes that live in one of these process-id namespaces."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            if str(link.readlink()) in namespaces:
                found.append(link.parts[2])
        except OSError:  # a process that ended meanwhile, or a zombie, which has no namespaces
            continue
    return found


def test_two_nodes_with_names_of_their_own_and_an_end_that_takes_all_along(tmp_path):
    hosts = HOSTS.read_text()
    log = tmp_path / "log"
    with LoopbackSlurm() as cluster:
        script = (
            "srun sh -c 'hostname; getent hosts node2 | cut -d\" \" -f1; readlink /proc/self/ns/pid'; exit 3"
        )
        job = cluster.submit("--nodes=2", f"--output={log}", "--wrap", script, cwd=tmp_path)
        ended = cluster.wait(job, timeout_s=60)
        assert (ended.state, ended.exit_code) == ("FAILED", 3)
        words = log.read_text().split()
        assert {"node1", "node2"} < set(words)
        assert words.count("127.0.0.1") == 2
        namespaces = {word for word in words if word.startswith("pid:")}
        assert len(namespaces) == 2

        running = cluster.submit("--nodes=2", f"--output={log}", "--wrap", "srun sleep 1000", cwd=tmp_path)
        with pytest.raises(
            ClusterError, match=rf"job {running} to end within 1 s, found:\n.*JobState=RUNNING"
        ):
            cluster.wait(running, timeout_s=1)
        assert processes_in(namespaces)
    assert not processes_in(namespaces)
    assert not cluster.folder.exists()
    assert HOSTS.read_text() == hosts


def test_sacct_tells_the_states_of_jobs_that_ended_and_that_run(cluster, tmp_path):
    options = ("--output=/dev/null", "--wrap")
    good, bad, running = (
        cluster.submit(*options, script, cwd=tmp_path) for script in ("true", "false", "sleep 1000")
    )
    for job in (good, bad):
        cluster.wait(job, timeout_s=60)
    deadline = time.monotonic() + 60
    while "JobState=RUNNING" not in cluster.command("scontrol", "show", "job", str(running)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    asked = [word for job in (good, bad, running) for word in ("-j", str(job))]
    printed = cluster.command("sacct", "-o", "JobID,State,NodeList", "--parsable2", *asked)
    cluster.command("scancel", str(running))
    states = [line.split("|")[:2] for line in printed.splitlines()]
    assert states == [
        ["JobID", "State"],
        [str(good), "COMPLETED"],
        [str(bad), "FAILED"],
        [str(running), "RUNNING"],
    ]


def test_a_refused_submission_says_what_sbatch_said(cluster, tmp_path):
    with pytest.raises(ClusterError, match=r"exit code 1:\nsbatch: error: .*generic resource"):
        cluster.submit("--gpus-per-node=8", "--wrap", "true", cwd=tmp_path)
