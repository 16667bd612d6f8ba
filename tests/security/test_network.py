"""Strangers on the network: they reach no port of a job from elsewhere, and neither join nor disturb it."""

import contextlib
import re
import secrets
import socket
import subprocess
import sys
import textwrap
import urllib.request

import pytest

from tests.trainer.conftest import ROOT, environment
from trainer.runtime import ranks
from trainer.runtime.ranks import SECRET, Placement, placement

TWO_ON_ONE_NODE = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node1",
}
# Prints the addresses on which this process listens, as Linux shows them.
LISTENING = """
import glob, os, re
sockets = " ".join(os.readlink(path) for path in glob.glob("/proc/self/fd/*") if os.path.lexists(path))
for line in [*open("/proc/self/net/tcp"), *open("/proc/self/net/tcp6")]:
    _, address, _, state, *_, inode = line.split()[:10]
    if state == "0A" and f"socket:[{inode}]" in sockets:
        print("listens", address)
"""
METRICS = """
import resource, sys
from trainer.config import MetricsConfig
from trainer.monitoring.prometheus import Metrics, serve
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
serve(Metrics(), MetricsConfig(port=0))
for _ in sys.stdin:
    open("/dev/null").close()
    print("opened", flush=True)
"""


def in_two_ranks(code, *own):
    """Run `code` in two ranks with each its own variables; return exit code, output and errors of both."""
    script = f"from trainer.runtime.ranks import join\nwith join():\n{textwrap.indent(code, '    ')}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment() | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for variables in own
    ]
    printed = [process.communicate(timeout=120) for process in both]
    return [(process.returncode, *texts) for process, texts in zip(both, printed, strict=True)]


def under_srun(rank, **variables):
    return TWO_ON_ONE_NODE | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} | variables


def test_the_ranks_of_a_node_listen_on_loopback_only():
    secret = secrets.token_hex(16)
    ended = in_two_ranks(LISTENING, *(under_srun(rank, LGAF_JOB_SECRET=secret) for rank in (0, 1)))
    for code, printed, errors in ended:
        assert code == 0, errors
        assert {*re.findall(r"listens (\w+):", printed)} == {"0100007F"}, printed


def test_rank_0_listens_on_the_address_of_its_name_only(monkeypatch):
    where = Placement(0, 2, 0, 1, "localhost", 0)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with ranks._listening(where) as listening:
        assert listening.getsockname()[0] in ("127.0.0.1", "::1")
    # A host whose own name is a loopback address, in a job of several nodes.
    assert ranks._address_of("lo") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(ranks, "_address_of", {"ib0": "127.0.0.2"}.__getitem__)
    with ranks._listening(where) as listening:
        assert listening.getsockname()[0] == "127.0.0.2"


def test_the_port_is_drawn_from_the_secret():
    drawn = {placement(under_srun(0, LGAF_JOB_SECRET=f"{i}")).master_port for i in range(100)}
    assert len(drawn) > 90
    again = {
        placement(under_srun(0, LGAF_JOB_SECRET="a", SLURM_RESTART_COUNT=f"{i}")).master_port
        for i in range(3)
    }
    assert len(again) == 3


def test_srun_without_a_secret_is_refused_once(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "_end", sys.exit)
    monkeypatch.delenv(SECRET, raising=False)
    for rank in (0, 1):
        for name, value in under_srun(rank).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended, ranks.join():
            pass
        assert ended.value.code == 1
    assert capsys.readouterr().err.count(f"expected the environment variable {SECRET}") == 1


def test_a_stranger_who_joins_is_an_error_on_every_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ended = in_two_ranks(
        "print('joined')",
        common | {"RANK": "0", SECRET: secrets.token_hex(16)},
        common | {"RANK": "1", SECRET: secrets.token_hex(16)},
    )
    assert [(code, printed) for code, printed, _ in ended] == [(1, ""), (1, "")]
    said = "".join(errors for *_, errors in ended)
    assert said.count(f"expected the same {SECRET} in the environment of all ranks") == 1, said


def test_no_rank_reads_a_pickle_of_another():
    rooms = ("data_pipeline", "partial_fc", "trainer", "slurm")
    code = "".join(path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py"))
    assert "all_gather(" in code
    assert not re.findall(r"\b(?:all_gather|gather|scatter|broadcast|send|recv)_object\w*", code)


def test_half_open_requests_do_not_take_the_training_s_files():
    process = subprocess.Popen(
        [sys.executable, "-c", METRICS],
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        url = re.search(r"http://127.0.0.1:(\d+)/metrics", process.stderr.readline())
        with contextlib.ExitStack() as connections:
            for _ in range(200):
                half_open = socket.create_connection(("127.0.0.1", int(url[1])), timeout=20)
                connections.enter_context(half_open).send(b"GET /metrics HTTP/1.0\r\n")
            assert all(opened(process) for _ in range(20))
        # Now the server has places again, as soon as it has noticed.
        assert any(b"lgaf_steps" in read(url[0]) for _ in range(1000))
        assert opened(process)
        process.stdin.close()


def opened(process):
    """Return whether the process could open a file."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline() == "opened\n"


def read(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=20) as response:
        return response.read()
    return b""
