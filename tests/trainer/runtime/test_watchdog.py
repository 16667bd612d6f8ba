"""A rank that is killed, stopped or stuck ends the whole job, and is named by one of the others."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch.distributed as dist

from tests.trainer.conftest import command, train_words
from tests.trainer.processes import children, start, wait_for
from trainer.runtime import watchdog

OPTIONS = (
    "steps=100000",
    "log_every_steps=1",
    "evaluation.sets=[]",
    "checkpoint.every_steps=100000",
    "watchdog.timeout_s=4",
)
SEEN = r"after [1-9]\d* steps, (computing|waiting for images)"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def two_ranks(faces, tmp_path):
    """Two ranks, training for seconds, without a launcher, which would end one when the other is gone."""
    port = free_port()
    words = command(*train_words(tmp_path / "run", faces, *OPTIONS))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [start(words, RANK=str(rank), **common) for rank in (0, 1)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    for process in both:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("train") > 30, process)
    # Thirty steps may take less than a beat; then each has not read yet that the other has done any.
    time.sleep(3 * watchdog._BEAT_S)
    yield both
    for process in both:
        process.kill()
        process.wait()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_rank_is_named_by_the_other(number, rank, two_ranks):
    victim, other = two_ranks[rank], two_ranks[1 - rank]
    victim.send_signal(number)
    _, said = other.communicate(timeout=60)
    assert other.returncode == 1, said
    found = re.findall(r"^lgaf: rank (\d): (.*)$", said, re.MULTILINE)
    assert [speaker for speaker, _ in found] == [str(1 - rank)], said
    # Rank 0 keeps the store, without which the other knows of no difference between dead and stopped.
    state = f"rank {rank} is dead or stopped; it" if rank else "rank 0 is dead or stopped; rank 0"
    assert re.search(rf"{state} was last seen {SEEN}$", found[0][1]), said
    if number == signal.SIGSTOP:
        assert "no progress was made for 4 s" in said


def test_a_rank_that_waits_for_its_images_for_ever_is_named(faces, tmp_path):
    script = tmp_path / "stuck.py"
    stuck = """
        import os, time
        from data_pipeline.indexed.loader import Loader
        from trainer.__main__ import main
        take = Loader.__next__
        def hang(self):
            if self._next == 5 and os.environ["RANK"] == "1":
                time.sleep(1000)
            return take(self)
        Loader.__next__ = hang
        main()
    """
    script.write_text(textwrap.dedent(stuck))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with start([*launcher, script, *train_words(tmp_path / "run", faces, *OPTIONS)]) as process:
        _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    expected = (
        r"no progress was made for 4 s \(.*\); rank 1 is furthest behind: after 5 steps, waiting for images$"
    )
    assert len(re.findall(rf"^lgaf: rank [01]: {expected}", said, re.MULTILINE)) == 1, said
    assert said.count("lgaf: rank") == 1, said


def test_ranks_end_when_their_torchrun_is_killed(faces, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with start(command(*train_words(tmp_path / "run", faces, *OPTIONS), ranks=2)) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("train") > 2, process)
        ranks = children(process)
        process.kill()
        # The ranks have the same standard error, which is at its end when they are.
        _, said = process.communicate(timeout=60)
    assert len(re.findall(r"lgaf: rank 1: .*torchrun is dead or stopped", said)) == 1, said
    assert not any(os.path.exists(f"/proc/{pid}") and not is_zombie(pid) for pid in ranks)


def is_zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def pulses(ranks, end):
    store = dist.HashStore()
    return [watchdog.Pulse(store, rank, ranks, keeper="nobody", end=end) for rank in range(ranks)]


def test_nothing_is_done_about_work_that_goes_on_or_a_limit_that_is_not_set(monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.02)
    ended = []
    limited, unlimited = pulses(2, ended.append)
    with limited, unlimited:
        limited.limit(2)
        for step in range(100):
            limited.note(step, "working")
            threading.Event().wait(0.03)
    assert ended == []


def test_slow_things_have_three_times_as_long(monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.02)
    ended = []
    first, _ = pulses(2, ended.append)
    over = threading.Event()
    first._end = lambda error: (ended.append(str(error)), over.set())
    with first:
        first.note(1, "saving", is_slow=True)
        first.limit(0.1)
        assert over.wait(20)
    assert ended[0] == "no progress was made for 0.3 s (watchdog.timeout_s)"


def test_nothing_beats_when_the_pulse_is_over(monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT_S", 60)
    begun, may_end = threading.Event(), threading.Event()
    (pulse,) = pulses(1, print)

    def publish(beat):
        begun.set()
        assert may_end.wait(20)

    pulse._publish = publish
    with pulse:
        assert begun.wait(20)
        threading.Timer(0.3, may_end.set).start()
    assert not pulse._beating.is_alive()


def test_a_store_that_hangs_does_not_keep_a_pulse_from_being_over(monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.02)
    begun, may_end = threading.Event(), threading.Event()
    (pulse,) = pulses(1, print)
    pulse._publish = lambda beat: (begun.set(), may_end.wait(60))
    with pulse:
        assert begun.wait(20)
    assert pulse._beating.is_alive()
    may_end.set()


def test_a_pulse_does_not_keep_the_process():
    code = """
        import torch.distributed as dist
        from trainer.runtime.ranks import leave
        from trainer.runtime.watchdog import Pulse
        Pulse(dist.HashStore(), 0, 1, keeper="nobody", end=print).__enter__()
        leave(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=True)
