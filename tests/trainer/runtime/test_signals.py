"""Graceful stop: a run saves, reports it once, exits with 75, and resumes without loss."""

import os
import re
import signal
import sys
import textwrap

import pytest

from tests.trainer.conftest import command, losses, run, train_words
from tests.trainer.processes import LGAF, SUBMITIT, children, patched, start, wait_for
from trainer.runtime.signals import EXIT_CODE, Stopped, StopRequest, name_of

STEPS = 12
# Far apart: a save in between was caused by the signal.
OPTIONS = (
    f"steps={STEPS}",
    "checkpoint.every_steps=1000",
    "evaluation.every_steps=1000",
    "evaluation.sets=[]",
    "log_every_steps=1",
)


@pytest.fixture(scope="module")
def straight(faces, tmp_path_factory):
    """One rank, start to end."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    done = run(*train_words(run_dir, faces, *OPTIONS))
    assert done.returncode == 0, done.stderr
    return losses(run_dir)


def steps_recorded(run_dir):
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.exists() else 0


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_as_if_there_had_been_none(number, straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    words = train_words(run_dir, faces, *OPTIONS)
    with start(command(*words)) as process:
        wait_for(lambda: steps_recorded(run_dir) >= 2, process)
        process.send_signal(number)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, said
    found = re.findall(rf"{name_of(number)}: saved at step (\d+); leaving with exit code 75", said)
    assert len(found) == 1, said
    assert checkpoints(run_dir) == [f"step-{int(found[0]):08d}"]
    assert list(losses(run_dir)) == list(range(1, int(found[0]) + 1))
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert losses(run_dir) == straight


TOLD_AS_TORCH_IS_LOADED = """
import os, signal, sys

class Early:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Early())
"""


@pytest.mark.parametrize("starter", [LGAF, SUBMITIT], ids=["lgaf", "submitit"])
def test_a_signal_counts_that_comes_while_the_process_starts(starter, straight, faces, tmp_path):
    run_dir = tmp_path / "run"
    words = train_words(run_dir, faces, *OPTIONS)
    with start([*patched(tmp_path, TOLD_AS_TORCH_IS_LOADED, starter=starter), *words]) as process:
        _, said = process.communicate(timeout=240)
    assert process.returncode == EXIT_CODE, said
    assert "SIGTERM: saved at step 1; leaving with exit code 75" in said
    assert run(*words).returncode == 0
    assert losses(run_dir) == straight


@pytest.mark.parametrize("whom", ["torchrun", "one rank"])
def test_two_ranks_agree_when_torchrun_or_one_of_them_is_told_to_stop(whom, faces, tmp_path):
    run_dir = tmp_path / "run"
    with start(command(*train_words(run_dir, faces, *OPTIONS, "steps=100000"), ranks=2)) as process:
        wait_for(lambda: steps_recorded(run_dir) >= 2, process)
        os.kill(process.pid if whom == "torchrun" else children(process)[1], signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert said.count("SIGTERM: saved at step") == 1, said
    # One that was told by torchrun and one that was not: both leave in order.
    assert "lgaf: rank" not in said
    if whom == "one rank":
        assert len(re.findall(rf"exitcode *: {EXIT_CODE}\b", said)) >= 1, said
    assert re.fullmatch(r"step-\d{8}", " ".join(checkpoints(run_dir)))


def test_a_checkpoint_that_is_not_done_by_the_deadline_is_given_up(faces, tmp_path):
    run_dir = tmp_path / "run"
    options = (*OPTIONS, "checkpoint.every_steps=2", "checkpoint.deadline_s=1", "steps=100000")
    words = train_words(run_dir, faces, *options)
    slow = """
        import time
        from trainer.checkpoint import storage
        from trainer.runtime import signals
        from trainer.__main__ import main
        take, save = signals.StopRequest._note, storage.write_part
        told = []
        def note(self, *arguments):
            told.append(1)
            take(self, *arguments)
        def slowly(*arguments, **named):
            if told:
                time.sleep(60)
            return save(*arguments, **named)
        signals.StopRequest._note, storage.write_part = note, slowly
        main()
    """
    with start([sys.executable, "-c", textwrap.dedent(slow), *words]) as process:
        # One must be whole before, however slow the disk is.
        wait_for(lambda: list(run_dir.glob("checkpoints/step-0???????")), process)
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, said
    assert len(re.findall(r"SIGUSR1: nothing more is saved: the deadline was exceeded", said)) == 1, said
    kept = checkpoints(run_dir)
    assert kept
    assert all(re.fullmatch(r"step-\d{7}[02468]", name) for name in kept), kept


def test_a_checkpoint_that_fails_while_leaving_is_given_up_by_all_ranks(faces, tmp_path):
    run_dir = tmp_path / "run"
    words = train_words(run_dir, faces, *OPTIONS, "steps=100000")
    full = """
        import os
        from trainer.__main__ import main
        from trainer.checkpoint import storage
        def fail(*arguments, **named):
            raise OSError("the disk is full")
        if os.environ["RANK"] == "1":
            storage.write_part = fail
        main()
    """
    script = tmp_path / "full.py"
    script.write_text(textwrap.dedent(full))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with start([*launcher, script, *words]) as process:
        wait_for(lambda: steps_recorded(run_dir) >= 2, process)
        os.kill(children(process)[0], signal.SIGUSR1)
        _, said = process.communicate(timeout=60)
    assert len(re.findall(r"SIGUSR1: nothing more is saved: ", said)) == 1, said
    assert "lgaf: rank" not in said
    assert checkpoints(run_dir) == []


@pytest.fixture
def _handlers():
    """Restore the handlers that the test changes."""
    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_the_gravest_of_several_signals_counts_and_a_late_one_does_no_harm():
    with StopRequest() as stop:
        assert stop.signal == 0
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.signal == signal.SIGTERM
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.usefixtures("_handlers")
def test_without_a_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("_handlers")
def test_a_rank_that_stopped_with_another_is_not_ended_by_a_late_signal():
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Stopped), StopRequest():
        raise Stopped(0, is_first=False)
    assert signal.getsignal(signal.SIGUSR1) != before
