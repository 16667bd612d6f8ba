"""Streamed shards: all samples arrive in the computed order despite network failures, and nothing hangs."""

import contextlib
import gc
import gzip
import itertools
import json
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset as wds
from fsspec.asyn import AsyncFileSystem
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.redaction import redacted
from data_pipeline.streaming import connection as remote_bytes
from data_pipeline.streaming import samples as remote
from data_pipeline.streaming.connection import Patience, RemoteError
from data_pipeline.streaming.samples import RemoteSamples

SHARDS, WINDOW = 4, 8
HASTY = Patience(attempts=4, timeout_s=5, backoff_s=0.001)


def samples_in(shard):
    """Yield (key, image, label) of a shard; lengths differ, the first is a multiple of the window."""
    rng = np.random.default_rng(shard)
    for i in range(2 * WINDOW + 3 * shard):
        yield f"{shard:02d}/{i:04d}", rng.bytes(int(rng.integers(1, 9000))), 100 * shard + i


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with wds.TarWriter(str(path / f"s-{shard}.tar")) as writer:
            for key, image, label in samples_in(shard):
                writer.write({"__key__": key, "jpg": image, "cls": str(label).encode()})
    return path


class Server(ThreadingHTTPServer):
    """Server of a folder; `faults` has one fault for each request in turn, None for no fault."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder, *, ranges=True, sends_length=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.sends_length = folder, ranges, sends_length
        self.faults, self.requests, self.released = iter(()), [], threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    """A fault is a status, "hang up", "stall", or the number of bytes after which the connection is cut."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        fault = next(self.server.faults, None)
        file = self.server.folder / self.path[1:]
        if fault == "hang up":
            self.close_connection = True
        elif isinstance(fault, tuple):
            self.send_error(fault[0])
        elif not file.exists():
            self.send_error(404)
        else:
            self.answer(file.read_bytes(), asked, fault)

    def answer(self, content, asked, fault):
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.sends_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: fault if isinstance(fault, int) else 3000 if fault == "stall" else None])
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait(30)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(folder):
    """Start servers of the shards."""
    with contextlib.ExitStack() as stack:

        def start(path=folder, **options):
            server = stack.enter_context(Server(path, **options))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            stack.callback(server.released.set)
            return server

        yield start


def read(urls, count, *, rank=0, world_size=1, cursor=None, seed=7, window=WINDOW, patience=HASTY):
    options = {"window": window, "cursor": cursor, "patience": patience}
    with RemoteSamples(urls, seed=seed, rank=rank, world_size=world_size, **options) as samples:
        return list(itertools.islice(samples, count))


def contents(samples):
    return [(sample.encoded.tobytes(), sample.label, sample.shard, sample.number) for sample in samples]


def paths(folder):
    return remote.shard_urls([f"{folder}/s-{{0..{SHARDS - 1}}}.tar"])


def in_one_epoch():
    return sum(len(list(samples_in(shard))) for shard in range(SHARDS))


def expected(positions, seed=7):
    """Yield the contents that one rank must read at the given positions, from the files."""
    for position in positions:
        shard = list(samples_in(remote.shard_of(seed, position, SHARDS)))
        number = 0
        for window_number, window in enumerate(cut(shard)):
            for i in remote.mixed(seed, position, window_number, len(window)):
                yield window[i][1], window[i][2], position, number
                number += 1


def cut(items):
    return [items[start : start + WINDOW] for start in range(0, len(items), WINDOW)]


# The arithmetic


@given(
    seed=st.integers(0, 2**32), n=st.integers(1, 40), world_size=st.integers(1, 9), epoch=st.integers(0, 30)
)
def test_every_shard_is_read_once_per_epoch_over_all_ranks(seed, n, world_size, epoch):
    cursor_W2 = remote.first_cursor(world_size)
    positions = [q for start, _ in cursor_W2.tolist() for q in range(start, (epoch + 1) * n, world_size)]
    assert sorted(positions) == list(range((epoch + 1) * n))
    shards = [remote.shard_of(seed, q, n) for q in positions if q >= epoch * n]
    assert sorted(shards) == list(range(n))


CURSORS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)), min_size=1, max_size=9)


@given(rows=CURSORS, world_size=st.integers(1, 9))
def test_resuming_is_exact_on_as_many_ranks_and_omits_nothing_on_others(rows, world_size):
    cursor_W2 = remote.resume(np.array(rows), world_size)
    assert (cursor_W2.dtype, cursor_W2.shape) == (np.int64, (world_size, 2))
    if len(rows) == world_size:
        assert cursor_W2.tolist() == [list(row) for row in rows]
        return
    smallest = min(position for position, _ in rows)
    assert cursor_W2[:, 0].tolist() == list(range(smallest, smallest + world_size))
    assert not cursor_W2[:, 1].any()


@given(position=st.integers(0, 2**31 - 1), number=st.integers(0, 10**6), samples=st.integers(0, 3000))
def test_a_window_is_permuted(position, number, samples):
    order_N = remote.mixed(3, position, number, samples)
    assert sorted(order_N.tolist()) == list(range(samples))


def test_windows_shards_and_seeds_are_mixed_in_other_ways():
    orders = [remote.mixed(*key, 500) for key in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))]
    for a, b in itertools.combinations([np.arange(500), *orders], 2):
        assert (a == b).mean() < 0.03


@pytest.mark.parametrize("wrong", [np.zeros((2, 3), int), np.zeros((0, 2), int), np.zeros((1, 2)), [[-1, 0]]])
def test_an_invalid_cursor_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a cursor"):
        remote.resume(wrong, 2)


# The list of shards


def test_patterns_are_expanded_and_sorted():
    urls = remote.shard_urls(["https://host/b-{08..11}.tar", "pipe:cat a-{0,1}.tar | awk '{print $1}\\n'"])
    assert urls == [
        *(f"https://host/b-{i}.tar" for i in ("08", "09", "10", "11")),
        *(f"pipe:cat a-{i}.tar | awk '{{print $1}}\\n'" for i in (0, 1)),
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "at least one shard"),
        (["a-{0..3}.tar", "a-2.tar"], r"1 repeated, first a-2\.tar"),
        (["htp://host/a.tar"], "found htp://"),
    ],
)
def test_a_wrong_list_is_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        remote.shard_urls(patterns)


def test_without_s3fs_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"s3:// is not installed: pip install 'lgaf\[s3\]'"):
        remote.shard_urls(["s3://bucket/train-{0..1}.tar"])


# Reading


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_reads_its_shards_in_the_computed_order(folder, rank):
    wanted = list(itertools.islice(expected(range(rank, 30, 3)), 90))
    assert contents(read(paths(folder), 90, rank=rank, world_size=3)) == wanted


def test_all_ranks_together_read_every_sample_once_per_epoch(folder):
    urls = paths(folder)
    labels = []
    for rank in range(2):
        # With an even number of shards both ranks start an epoch together.
        samples = read(urls, in_one_epoch(), rank=rank, world_size=2)
        labels += [sample.label for sample in samples if sample.shard < SHARDS]
    assert sorted(labels) == sorted(label for shard in range(SHARDS) for *_, label in samples_in(shard))


def test_a_run_resumes_after_any_sample(folder):
    urls = paths(folder)
    uninterrupted = contents(read(urls, 90, rank=1, world_size=2))
    samples = read(urls, 60, rank=1, world_size=2)
    for trained in (1, 7, 8, 9, *(i + 1 for i in range(60) if samples[i].after[1] == 0), 60):
        cursor_W2 = np.array([[0, 0], samples[trained - 1].after])
        followed = read(urls, 20, rank=1, world_size=2, cursor=cursor_W2)
        assert contents(followed) == uninterrupted[trained : trained + 20]


def test_the_name_leads_to_the_sample(folder):
    sample = read([f"{folder}/s-0.tar"], 1)[0]
    key = next(key for key, _, label in samples_in(0) if label == sample.label)
    assert sample.name == f"{folder}/s-0.tar: sample {key!r}"


def test_a_cursor_beyond_the_shard_is_refused(folder):
    with pytest.raises(RemoteError, match=r"more than the 16 samples .* found 16"):
        read([f"{folder}/s-0.tar"], 1, cursor=np.array([[0, 16]]))


def test_labels_may_be_in_json(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "about", "json": {"made": "today"}})
        writer.write({"__key__": "a", "png": b"x", "json": {"label": 3}})
        writer.write({"__key__": "b", "webp": b"x", "json": {"cls": 4}})
    samples = read([str(tmp_path / "a.tar")], 2)
    assert sorted(sample.label for sample in samples) == [3, 4]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b"x"}, "whole number .* found neither"),
        ({"cls": b"1"}, "one image .* found 0 images"),
        ({"jpg": b"", "cls": b"1"}, "found an empty one"),
        ({"jpg": b"x", "png": b"y", "cls": b"1"}, "found 2 images"),
        ({"jpg": b"x", "cls": b"-1"}, "found b'-1'"),
        ({"jpg": b"x", "cls": b"9223372036854775808"}, "whole number"),
        ({"jpg": b"x", "json": json.dumps({"label": 1.5}).encode()}, "found b'{"),
        ({"jpg": b"x", "json": b"[" * 100_000}, "whole number"),
    ],
)
def test_an_incomplete_sample_is_named(tmp_path, members, message):
    path = tmp_path / "a.tar"
    with wds.TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "00/7", **members})
    with pytest.raises(RemoteError, match=message) as caught:
        read([str(path)], 1)
    assert str(caught.value).startswith(f"{path}: sample '00/7': ")


# The network


def test_http_gives_the_contents_of_the_files(folder, serve):
    url = serve().url("s-{0..3}.tar")
    wanted = contents(read(paths(folder), 100))
    assert contents(read(remote.shard_urls([url]), 100)) == wanted


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_broken_connection_resumes_where_it_stopped(folder, serve, ranges, seed):
    rng = np.random.default_rng(seed)
    server = serve(ranges=ranges)
    size = (folder / "s-3.tar").stat().st_size
    cuts = np.sort(rng.integers(1, size, 6)).tolist()
    lengths = np.diff([0, *cuts]).tolist() if ranges else cuts
    trouble = ["hang up", (503,), (429,), 0, "hang up"]
    server.faults = iter(itertools.chain(*([length, *trouble[: i % 3]] for i, length in enumerate(lengths))))
    wanted = contents(read([f"{folder}/s-3.tar"], 25))
    assert contents(read([server.url("s-3.tar")], 25)) == wanted
    assert len(server.requests) >= 6
    if ranges:
        assert {asked for _, asked in server.requests} >= {f"bytes={cut}-" for cut in cuts if cut > 0}


def test_silence_is_ended_by_the_timeout(folder, serve):
    server = serve()
    server.faults = iter(["stall"])
    hasty = HASTY._replace(timeout_s=2)
    wanted = contents(read([f"{folder}/s-0.tar"], 16))
    assert contents(read([server.url("s-0.tar")], 16, patience=hasty)) == wanted
    assert server.requests[1] == ("/s-0.tar", "bytes=3000-")


def test_patience_ends_with_a_message_that_names_all(serve):
    server = serve()
    server.faults = itertools.chain([5000], itertools.repeat((503,)))
    url = server.url("s-0.tar")
    with pytest.raises(
        RemoteError, match=r"found none beyond byte 5000 in 4 attempts.* HTTP status 503"
    ) as caught:
        read([url], 16)
    assert str(caught.value).startswith(url)
    assert len(server.requests) == 4


@pytest.fixture
def silent():
    """A server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_endless_silence_is_an_error(silent):
    hasty = Patience(attempts=2, timeout_s=0.2, backoff_s=0.001)
    with pytest.raises(RemoteError, match=r"found none beyond byte 0 in 2 attempts.*no data for 0\.2 s"):
        read([silent + "/s-0.tar"], 16, patience=hasty)


def test_a_missing_shard_fails_at_once(folder, serve):
    server = serve()
    with pytest.raises(RemoteError, match="HTTP status 404"):
        read([server.url("s-9.tar")], 1)
    assert len(server.requests) == 1
    with pytest.raises(RemoteError, match=r"s-9\.tar"):
        read([f"{folder}/s-9.tar"], 1)


@pytest.mark.parametrize("place", ["header", "data", "before the zeros", "empty"])
def test_a_truncated_shard_is_an_error(folder, serve, tmp_path, place):
    content = (folder / "s-0.tar").read_bytes()
    with tarfile.open(folder / "s-0.tar") as archive:
        members = archive.getmembers()
    end = {
        "header": members[20].offset + 100,
        "data": members[21].offset_data + members[21].size // 2,
        "before the zeros": members[20].offset,
        "empty": 0,
    }[place]
    (tmp_path / "cut.tar").write_bytes(content[:end])
    # Without a Content-Length the connection does not detect a truncation.
    server = serve(tmp_path, sends_length=False)
    for url in (str(tmp_path / "cut.tar"), server.url("cut.tar"), f"pipe:cat {tmp_path}/cut.tar"):
        with pytest.raises(RemoteError, match=r"truncated|damage") as caught:
            read([url], 16)
        number = " (shard 0)" if url.startswith("pipe:") else ""
        assert str(caught.value).startswith(f"{redacted(url)}{number}: ")


def test_a_length_that_is_never_reached_is_an_error(serve):
    server = serve()
    size = (server.folder / "s-0.tar").stat().st_size
    server.faults = itertools.chain([size - 20_000], itertools.repeat(0))
    with pytest.raises(RemoteError, match=f"found none beyond byte {size - 20_000}"):
        read([server.url("s-0.tar")], 16)


@pytest.mark.parametrize("damage", ["header", "joined", "compressed", "no tar", "no sample"])
def test_a_damaged_archive_is_never_a_shorter_one(folder, tmp_path, damage):
    content = bytearray((folder / "s-0.tar").read_bytes())
    with tarfile.open(folder / "s-0.tar") as archive:
        last = archive.getmembers()[-1]
    if damage == "header":
        content[last.offset + 3] ^= 1
    wrong = {
        "header": content,
        "joined": content + content,
        "compressed": gzip.compress(content),
        "no tar": b"<html>not found</html>" * 100,
        "no sample": bytes(10240),
    }[damage]
    path = tmp_path / "a.tar"
    path.write_bytes(wrong)
    with pytest.raises(RemoteError) as caught:
        read([str(path)], 17)
    assert str(caught.value).startswith(f"{path}: expected")


# Commands and filesystems


def test_a_command_is_read_like_a_file(folder):
    urls = remote.shard_urls([f"pipe:cat {folder}/s-{{0..3}}.tar"])
    assert contents(read(urls, 100)) == contents(read(paths(folder), 100))


def test_a_command_that_fails_is_an_error_with_its_output(folder):
    url = f"pipe:cat {folder}/s-0.tar; echo no more >&2; exit 3"
    with pytest.raises(
        RemoteError, match=r"in 4 attempts.*status 3 of the command, with the output: no more"
    ):
        read([url], 16)


def test_a_command_is_restarted_and_received_bytes_are_skipped(folder, tmp_path):
    state, file = tmp_path / "runs", folder / "s-3.tar"
    # Each run returns 30 kB more than the previous one and then fails, until the file is complete.
    script = (
        f"echo >>{state}; n=$(wc -l <{state}); head -c $((n * 30000)) {file}; "
        f"test $((n * 30000)) -ge {file.stat().st_size}"
    )
    assert contents(read([f"pipe:{script}"], 25)) == contents(read([str(file)], 25))


def test_a_command_that_returns_less_after_a_restart_is_an_error(folder, tmp_path):
    script = f"test -e {tmp_path}/ran && exit 0; touch {tmp_path}/ran; head -c 9000 {folder}/s-0.tar; exit 1"
    with pytest.raises(RemoteError, match="ended at byte 0, after an earlier connection had sent 9000"):
        read([f"pipe:{script}"], 16)


def test_any_filesystem_of_fsspec_is_read(folder, monkeypatch):
    monkeypatch.setattr(remote_bytes, "_RANGE_BYTES", 10_000)
    for shard in range(SHARDS):
        fsspec.filesystem("memory").pipe(f"/bucket/s-{shard}.tar", (folder / f"s-{shard}.tar").read_bytes())
    urls = remote.shard_urls(["memory://bucket/s-{0..3}.tar"])
    assert contents(read(urls, 100)) == contents(read(paths(folder), 100))


class Shaky(AsyncFileSystem):
    """An asynchronous filesystem like s3fs, of which every third call fails."""

    protocol = "shaky"
    calls = 0

    def _count(self):
        Shaky.calls += 1
        if Shaky.calls % 3 == 0:
            raise OSError("SlowDown")

    async def _info(self, path, **_):
        self._count()
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    async def _cat_file(self, path, start=None, end=None, **_):
        self._count()
        return Path(path).read_bytes()[start:end]


def test_a_filesystem_with_coroutines_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr(remote_bytes, "_RANGE_BYTES", 10_000)
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    urls = remote.shard_urls([f"shaky://{folder}/s-{{0..3}}.tar"])
    assert contents(read(urls, 100)) == contents(read(paths(folder), 100))


# The thread


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "shards"]


def is_running(mark):
    found = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return any(mark.encode() in line for line in found)


def until(is_true, limit_s=10):
    """Wait for an effect of another thread or process; return True if it occurs in time."""
    end = time.monotonic() + limit_s
    while not is_true() and time.monotonic() < end:
        time.sleep(0.01)
    return is_true()


@pytest.fixture
def stuck(folder, silent):
    """URLs of shards that block a reader: in a full queue, a command, a server, a pause."""
    return {
        "queue": f"{folder}/s-3.tar",
        "command": f"pipe:head -c 3000 {folder}/s-3.tar; sleep 987",
        "server": silent + "/s-3.tar",
        "pause": "pipe:exit 1",
    }


SLOW = Patience(attempts=3, timeout_s=500, backoff_s=500)
STUCK = ["queue", "command", "server", "pause"]


@pytest.mark.parametrize("where", STUCK)
@pytest.mark.parametrize("end", ["close", "collect", "raise"])
def test_the_thread_ends_wherever_it_waits(stuck, where, end):
    samples = RemoteSamples([stuck[where]], seed=0, rank=0, world_size=1, window=4, patience=SLOW)
    time.sleep(0.1)
    assert len(readers()) == 1
    if end == "close":
        samples.close()
        assert list(samples) == []
    elif end == "raise":
        with pytest.raises(KeyError), samples:
            raise KeyError
    del samples
    gc.collect()
    assert until(lambda: not readers())
    assert not is_running("sleep 987")


def test_a_consumer_that_waits_in_another_thread_is_released(stuck):
    samples = RemoteSamples([stuck["server"]], seed=0, rank=0, world_size=1, window=4, patience=SLOW)
    taken = []
    consumer = threading.Thread(target=lambda: taken.extend(samples))
    consumer.start()
    samples.close()
    consumer.join(10)
    assert not consumer.is_alive()
    assert taken == []


def test_the_interpreter_ends_while_readers_wait(stuck):
    code = (
        "import sys, time; from data_pipeline.streaming.samples import *\n"
        "kept = [RemoteSamples([url], seed=0, rank=0, world_size=1, window=4,"
        " patience=Patience(3, 500, 500)) for url in sys.argv[1:]]\n"
        "time.sleep(0.2); raise SystemExit(5)"
    )
    urls = [url.replace("987", "986") for url in stuck.values()]
    done = subprocess.run(
        [sys.executable, "-c", code, *urls],
        cwd=Path(__file__).parents[3],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (5, "")
    assert not is_running("sleep 986")


def test_an_error_comes_after_all_samples_before_it_and_is_raised_again(folder):
    urls = [f"pipe:head -c 80000 {folder}/s-3.tar"]
    with RemoteSamples(urls, seed=7, rank=0, world_size=1, window=4, patience=HASTY) as samples:
        seen = []
        with pytest.raises(RemoteError):
            # `+=` appends one by one, so the samples before the error are kept.
            seen += samples
        assert contents(seen) == contents(read([f"{folder}/s-3.tar"], len(seen), window=4))
        assert seen
        with pytest.raises(RemoteError):
            next(samples)
