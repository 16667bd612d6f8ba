"""How the process of a rank ends: in order, with the right code, and without the interpreter's teardown."""

import subprocess
import sys
import textwrap

import pytest

from tests.trainer.conftest import environment, run, train_words
from tests.trainer.processes import LGAF, SUBMITIT, patched, start
from trainer.runtime.signals import EXIT_CODE

OPTIONS = ("steps=2", "evaluation.sets=[]")
# Python clears `sys` last of all in its teardown: without one, nothing aborts.
ABORTS_IN_THE_TEARDOWN = """
import atexit, os, pathlib, sys
class Late:
    def __del__(self, abort=os.abort):
        abort()
sys.late = Late()
atexit.register(pathlib.Path({mark!r}).touch)
"""
# SIGTERM: after it the job is not requeued.
TOLD_IN_A_STEP = """
import signal
from trainer import loop
seed = loop.seed_dropout
def told(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    seed(*given)
loop.seed_dropout = told
"""


@pytest.fixture(scope="module")
def trained(faces, tmp_path_factory):
    """The folder of a run that has ended."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = run(*train_words(run_dir, faces, *OPTIONS))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize(
    ("what", "told", "starter", "code"),
    [
        ("train", "", LGAF, 0),
        ("train", TOLD_IN_A_STEP, LGAF, EXIT_CODE),
        ("train", TOLD_IN_A_STEP, SUBMITIT, EXIT_CODE),
        ("eval", "", LGAF, 0),
        ("export", "", LGAF, 0),
        ("export nowhere", "", LGAF, 1),
    ],
    ids=["trained", "stopped", "stopped by submitit", "evaluated", "exported", "failed after that"],
)
def test_the_interpreter_is_not_taken_apart(what, told, starter, code, trained, faces, tmp_path):
    words = {
        "train": train_words(tmp_path / "run", faces, *OPTIONS),
        "eval": ["eval", trained, "--pairs", faces / "held_out.bin"],
        "export": ["export", trained, "--out", tmp_path / "network.safetensors"],
        "export nowhere": ["export", trained, "--out", "/proc/network.safetensors"],
    }
    first = ABORTS_IN_THE_TEARDOWN.format(mark=str(tmp_path / "orderly")) + told
    with start([*patched(tmp_path, first, starter=starter), *words[what]]) as process:
        _, said = process.communicate(timeout=240)
    assert process.returncode == code, said
    assert (tmp_path / "orderly").exists()


# Alive: an unclosed pool, and a thread. Printed and not flushed: by Python and by C.
ENDS = """
import concurrent.futures, ctypes, multiprocessing, threading, time
from trainer.runtime.ranks import leave
pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
pool.submit(int).result()
def late():
    time.sleep(0.3)
    ctypes.CDLL(None).printf(b"c\\n")
threading.Thread(target=late).start()
print("python", end=" ")
leave(75)
"""


@pytest.mark.parametrize("ends_in", ["a file", "nothing", "a broken pipe"])
def test_what_is_alive_is_waited_for_and_no_output_changes_the_code(ends_in, tmp_path):
    ways = {"a file": f"> {tmp_path}/out", "nothing": ">&-", "a broken pipe": "> >(exit)"}
    words = ["bash", "-c", f'"$@" {ways[ends_in]}', "bash", sys.executable, "-c", ENDS]
    buffered = environment() | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(words, env=buffered, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (EXIT_CODE, "")
    if ends_in == "a file":
        assert (tmp_path / "out").read_text() == "python c\n"


def test_a_print_that_is_stuck_does_not_keep_the_process():
    code = """
        import os, threading, time
        from trainer.runtime.ranks import _end
        def end():
            time.sleep(1)  # the main thread fills the pipe, which has no reader
            _end(1)
        threading.Thread(target=end).start()
        while True:
            print("x" * 1000)
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    buffered = environment() | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(words, env=buffered, stdout=subprocess.PIPE) as process:
        assert process.wait(240) == 1
