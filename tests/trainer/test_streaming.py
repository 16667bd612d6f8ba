"""Whole trainings on shards that a server sends: learnt from, gone on with, refused with a reason."""

import functools
import http.server
import json
import shutil
import threading

import pytest

from data_pipeline.tools.convert import convert
from tests.trainer.conftest import losses, run, train_words

STEPS = 12
SHARDS = 8
OPTIONS = (f"steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep=3", "head.sample_rate=0.5")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url(faces, tmp_path_factory):
    """Where a server sends the 160 faces in eight shards."""
    folder = tmp_path_factory.mktemp("server")
    convert(faces, folder / "shards", shard_samples=160 // SHARDS)
    handler = functools.partial(QuietHandler, directory=folder / "shards")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/train-{{000000..{SHARDS - 1:06d}}}.tar"
        server.shutdown()


def words(run_dir, faces, url, *options):
    streamed = (
        "data.path=[]",
        f'data.shards=["{url}"]',
        "data.num_classes=20",
        "data.shards_window=16",
        f'evaluation.sets=["{faces / "held_out.bin"}"]',
    )
    return train_words(run_dir, faces, *OPTIONS, *streamed, *options)


@pytest.fixture(scope="module")
def straight(faces, url, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    done = run(*words(run_dir, faces, url), ranks=2)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_stream_is_trained_on(straight):
    found = losses(straight)
    assert list(found) == list(range(1, STEPS + 1))
    assert sum(found[step] for step in range(STEPS - 3, STEPS + 1)) / 4 < 0.95 * found[1]
    header = json.loads((straight / "checkpoints" / f"step-{STEPS:08d}" / "checkpoint.json").read_text())
    # 12 steps of 16 images are 9.6 shards of 20: each rank is in its tenth.
    assert [done for _, done in header["cursor"]] == [12, 12]
    assert [shard for shard, _ in header["cursor"]] == [18, 19]


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_run_goes_on_where_its_stream_was(straight, faces, url, tmp_path, ranks):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    for step in (8, STEPS):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
    (run_dir / "result.json").unlink()
    done = run(*words(run_dir, faces, url), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "steps 4 to 12" in done.stderr
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    if ranks == 2:
        assert losses(run_dir) == losses(straight)


def test_a_server_without_the_shards_is_said_once(faces, url, tmp_path):
    missing = url.replace("train-", "absent-")
    done = run(*words(tmp_path / "run", faces, missing), ranks=2, timeout_s=120)
    assert done.returncode != 0
    assert done.stderr.count("lgaf: rank") == 1, done.stderr
    assert "tar: cannot be read: HTTP status 404" in done.stderr
