"""Training samples from WebDataset shards that are streamed from afar, and where to go on after a stop.

    urls       train-{000000..000099}.tar -> a sorted list of n shards
    order      position q of the infinite sequence of shards -> one of the n                pure
    ranks      rank r of W reads the positions q0 + r, q0 + r + W, q0 + r + 2 W, ...        pure
    bytes      pipe:, http(s)://, a local path or any URL of fsspec -> one unbroken stream
    samples    the stream -> images and labels, by webdataset
    mix        windows of samples, each permuted by (seed, position, window)                pure
    queue      a thread reads ahead of the consumer by one window

So the order is a function of integers, and what a rank has to remember is two of them: the position of the
shard it reads, and how many of its samples are done. To go on, the shard is streamed again from its start
and that many samples are dropped. On another number of ranks all start at the smallest position that is not
done: no shard is left out, at most those in flight are seen again.

A connection that breaks or stalls is made anew and goes on at the byte where it stopped. A shard that ends
before the end of its archive is an error, never a shorter shard.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import queue
import re
import signal
import tarfile
import tempfile
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

import aiohttp
import fsspec
import numpy as np
from braceexpand import braceexpand
from fsspec.asyn import get_loop
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data_pipeline import counter, order
from data_pipeline.tarshards import label_of_cls, label_of_json

_Chunks = AsyncGenerator[tuple[int, bytes], None]

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MIX = 8
_ZEROS = bytes(tarfile.BLOCKSIZE)
_CHUNK_BYTES = 1 << 20
# An object store answers every range with a request of its own.
_RANGE_BYTES = 8 << 20
_LONGEST_PAUSE_S = 60.0
_NOTICE_S = 0.1
_KILLED_S = 1.0


class RemoteError(ValueError):
    """A shard that cannot be read, is cut short, or has a sample that is not whole; names it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self._message = message

    def __str__(self) -> str:
        # webdataset adds to the arguments of every exception that passes through it.
        return self._message


class Patience(NamedTuple):
    """What is borne of a server: `attempts` in a row without a new byte, silence of `timeout_s` seconds.

    Before the second attempt there is a pause of `backoff_s` seconds, before each further one twice as long,
    up to a minute.
    """

    attempts: int = 10
    timeout_s: float = 60.0
    backoff_s: float = 1.0


class Sample(NamedTuple):
    """An encoded image uint8 [n] and its label; `name` is for messages: the shard's URL and the key.

    `shard` is the position in the sequence of shards, `number` counts the shard's samples in the order in
    which they come. `after` is its rank's row of the cursor once this sample has been trained.
    """

    encoded: np.ndarray
    label: int
    name: str
    shard: int
    number: int
    after: tuple[int, int]


def shard_urls(patterns: Sequence[str]) -> list[str]:
    """All shards that the patterns name, braces expanded ({000..099}, {a,b}), sorted.

    Raises ValueError for no shard at all, one that is named twice, and a URL that cannot be read here.
    """
    urls = sorted(url for pattern in patterns for url in braceexpand(pattern, escape=False))
    if not urls:
        raise ValueError(f"expected the URLs of at least one shard, found none in {list(patterns)}")
    twice = [url for url, following in itertools.pairwise(urls) if url == following]
    if twice:
        raise ValueError(
            f"expected every shard once, found {len(twice)} named again, first {twice[0]}; "
            "let the patterns not overlap"
        )
    for url in urls:
        _require_reader(url)
    return urls


def first_cursor(world_size: int) -> np.ndarray:
    """The cursor int64 [W, 2] of a run that has not begun."""
    return _started_at(0, world_size)


def resume(cursor_V2: np.ndarray, world_size: int) -> np.ndarray:
    """The cursor int64 [W, 2] with which `world_size` ranks go on from that of V ranks.

    Row r is the position of the shard that rank r reads next and the number of its samples that are done.
    With W = V nothing changes; else all start at the smallest position that is not done. Raises ValueError
    for what is no cursor.
    """
    cursor_V2 = np.asarray(cursor_V2)
    is_whole = np.issubdtype(cursor_V2.dtype, np.integer)
    if not is_whole or cursor_V2.ndim != 2 or cursor_V2.shape[1] != 2 or not cursor_V2.size:
        raise ValueError(
            f"expected a cursor of whole numbers [ranks, 2], found {cursor_V2.dtype} {list(cursor_V2.shape)}"
        )
    if (cursor_V2 < 0).any():
        raise ValueError(f"expected a cursor of positions and counts from 0, found {cursor_V2.tolist()}")
    if len(cursor_V2) == world_size:
        return cursor_V2.astype(np.int64)
    return _started_at(int(cursor_V2[:, 0].min()), world_size)


def shard_of(seed: int, position: int, shards: int) -> int:
    """Which of so many shards stands at a position of the infinite sequence."""
    return int(order.record_of(seed, np.array([position]), shards)[0])


def mixed(seed: int, position: int, window_number: int, samples: int) -> np.ndarray:
    """The order int64 [samples] in which the samples of a shard's window come."""
    at_N = (position << 32) + np.arange(samples, dtype=np.int64)
    high_N, low_N, *_ = counter.words(seed, at_N, _MIX << 32 | window_number)
    return np.lexsort((low_N, high_N))


class RemoteSamples:
    """Iterates once, without end, over the samples of one rank; a thread reads ahead of it.

    `window` samples are mixed with each other; up to three times as many encoded images are held in memory.
    `cursor` is that of a checkpoint, int64 [V, 2] for any number V of ranks, None at the start of a run.
    Errors in reading are raised by the iteration as RemoteError, once what came before has been given out.
    `close` ends the thread; garbage collection and the end of the interpreter do so too.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        seed: int,
        rank: int,
        world_size: int,
        window: int,
        cursor: np.ndarray | None = None,
        patience: Patience = Patience(),  # noqa: B008 - immutable
    ) -> None:
        _require_share(urls, rank, world_size, window)
        cursor_W2 = first_cursor(world_size) if cursor is None else resume(cursor, world_size)
        position, done = cursor_W2[rank].tolist()
        self._waits = waits = _Waits()
        samples = _endless(list(urls), seed, position, done, world_size, window, patience, waits)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=window)
        # The thread knows nothing of this object, so that it can be collected.
        self._thread = threading.Thread(
            target=_read_ahead, args=(samples, self._queue, waits), name="shards", daemon=True
        )
        self._finalizer = weakref.finalize(self, _end, waits, self._thread)
        self._thread.start()

    def __iter__(self) -> RemoteSamples:
        return self

    def __next__(self) -> Sample:
        if not self._finalizer.alive:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Sample):
            return item
        # Whoever asks again is told the same.
        self._queue.put(item)
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> RemoteSamples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading thread and close its connection; the iteration is then over."""
        self._finalizer()
        # A consumer in another thread may be waiting.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)


def _started_at(position: int, world_size: int) -> np.ndarray:
    cursor_W2 = np.zeros((world_size, 2), np.int64)
    cursor_W2[:, 0] = position + np.arange(world_size)
    return cursor_W2


def _require_reader(url: str) -> None:
    if url.startswith(("pipe:", "http://", "https://")):
        return
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        how = "pip install 'lgaf[s3]'" if protocol in ("s3", "s3a") else error
        raise ValueError(f"{url}: a package that reads {protocol}:// is not installed: {how}") from error
    except ValueError as error:
        raise ValueError(
            f"{url}: expected pipe:, http://, https://, a local path or a protocol of fsspec, "
            f"found {protocol}://; correct it"
        ) from error


def _require_share(urls: Sequence[str], rank: int, world_size: int, window: int) -> None:
    if not urls:
        raise ValueError("expected the URLs of at least one shard, found none")
    if not 0 <= rank < world_size:
        raise ValueError(f"expected a rank from 0 to {world_size - 1}, found {rank}")
    if window < 1:
        raise ValueError(f"expected a window of at least 1 sample, found {window}")


def _endless(
    urls: list[str],
    seed: int,
    position: int,
    done: int,
    world_size: int,
    window: int,
    patience: Patience,
    waits: _Waits,
) -> Iterator[Sample]:
    """The samples of a rank from `done` samples into the shard at `position` on."""
    while True:
        url = urls[shard_of(seed, position, len(urls))]
        with contextlib.closing(_Stream(url, patience, waits)) as stream:
            yield from _of_shard(stream, seed, position, done, position + world_size, window)
        position, done = position + world_size, 0


def _of_shard(
    stream: _Stream, seed: int, position: int, done: int, next_position: int, window: int
) -> Iterator[Sample]:
    first = 0
    for window_number, (window_samples, is_last) in enumerate(_windows(_decoded(stream), window)):
        end = first + len(window_samples)
        order_N = mixed(seed, position, window_number, len(window_samples))
        for number, i in enumerate(order_N.tolist(), first):
            if number >= done:
                is_end = is_last and number == end - 1
                after = (next_position, 0) if is_end else (position, number + 1)
                encoded, label, name = window_samples[i]
                yield Sample(encoded, label, name, position, number, after)
        first = end
    if not first:
        raise RemoteError(f"{stream.url}: expected samples, found an empty archive; remove it from the list")
    if first <= done:
        raise RemoteError(
            f"{stream.url}: expected more than the {done} samples that the checkpoint has done of it, found "
            f"{first}: it is another shard than then; restore the shards, their list and the seed"
        )


def _windows(items: Iterator[Any], size: int) -> Iterator[tuple[list[Any], bool]]:
    """The items, `size` at a time, and whether they are the last."""
    window = list(itertools.islice(items, size))
    while window:
        following = list(itertools.islice(items, 1))
        yield window, not following
        window = following + list(itertools.islice(items, size - 1)) if following else []


def _decoded(stream: _Stream) -> Iterator[tuple[np.ndarray, int, str]]:
    """Image, label and name of all samples of a shard, in its own order."""
    try:
        for members in group_by_keys(_files(stream)):
            # A group with neither is something else, such as a file that describes the shard.
            if "cls" in members or any(suffix in members for suffix in _IMAGE_SUFFIXES):
                yield _image_and_label(members, f"{stream.url}: sample {members['__key__']!r}")
    except RemoteError:
        raise
    except (tarfile.TarError, ValueError) as error:
        # The text before what webdataset has added.
        reason = str(error.args[0]).partition(" @ ")[0]
        raise RemoteError(
            f"{stream.url}: expected a tar archive, found damage at byte {stream.at} or before: {reason}; "
            "copy it to the server anew"
        ) from error


def _files(stream: _Stream) -> Iterator[dict[str, Any]]:
    for file in tar_file_iterator(stream):
        yield {"__url__": stream.url, **file}
    stream.require_end_of_archive()


def _image_and_label(members: dict[str, Any], name: str) -> tuple[np.ndarray, int, str]:
    images = [members[suffix] for suffix in _IMAGE_SUFFIXES if suffix in members]
    if len(images) != 1 or not images[0]:
        found = f"{len(images)} images" if len(images) != 1 else "an empty one"
        raise RemoteError(
            f"{name}: expected one image (.{', .'.join(_IMAGE_SUFFIXES)}), found {found}; write it anew"
        )
    return np.frombuffer(images[0], np.uint8), _label(members, name), name


def _label(members: dict[str, Any], name: str) -> int:
    """What .cls says, else "label" or "cls" in .json."""
    text: bytes | None = members.get("cls", members.get("json"))
    label = None
    with contextlib.suppress(ValueError):  # more digits than Python takes
        label = label_of_cls(members["cls"]) if "cls" in members else label_of_json(text or b"{}")
    if label is None or not 0 <= label < 1 << 63:
        raise RemoteError(
            f"{name}: expected a whole number from 0 in .cls, or as 'label' or 'cls' in .json, found "
            f"{'neither' if text is None else repr(text[:80])}; write it anew"
        )
    return label


class _Stream:
    """The bytes of one shard as webdataset reads them, whatever happens to the connection."""

    def __init__(self, url: str, patience: Patience, waits: _Waits) -> None:
        self.url, self._patience, self._waits = url, patience, waits
        self._chunks: _Chunks | None = None
        self._received = self._connection_at = 0
        self._buffer, self._used = b"", 0
        self._is_over = False
        self._last_block = b""

    @property
    def at(self) -> int:
        """The number of bytes that have been given out."""
        return self._received - len(self._buffer) + self._used

    def read(self, _: int = -1) -> bytes:
        """The next block of the archive, however much is asked for; empty at the end.

        Block by block, because what tarfile has read last then is what made it stop.
        """
        while len(self._buffer) - self._used < tarfile.BLOCKSIZE and (chunk := self._fetch()):
            self._buffer, self._used = self._buffer[self._used :] + chunk, 0
        block = self._buffer[self._used : self._used + tarfile.BLOCKSIZE]
        self._used += len(block)
        self._last_block = block
        return block

    def require_end_of_archive(self) -> None:
        """Read on to the end. Raises RemoteError if the archive does not end in zeros.

        tarfile stops without a word where the next header is cut off or damaged.
        """
        if self._last_block != _ZEROS:
            raise RemoteError(
                f"{self.url}: expected an uncompressed tar archive up to its closing blocks of zeros, found "
                f"{'its end' if self._is_over else 'no header'} at byte {self.at}: "
                "it is cut short, damaged or compressed; copy it to the server anew"
            )
        while block := self.read():
            if block.strip(b"\0"):
                raise RemoteError(
                    f"{self.url}: expected nothing after the end of the archive, found more at byte "
                    f"{self.at - len(block)}; write joined archives anew, as one or as several"
                )

    def close(self) -> None:
        if self._chunks is not None:
            self._waits.finish(self._chunks.aclose(), self._patience.timeout_s)
            self._chunks = None

    def _fetch(self) -> bytes:
        """New bytes, none at the end; connects as often as the patience lasts."""
        for attempt in range(1, self._patience.attempts + 1):
            try:
                return self._new_bytes()
            except (_FinalError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise RemoteError(f"{self.url}: cannot be read: {error}") from error
            # What the filesystems of fsspec raise on bad networks is not documented.
            except Exception as error:
                reason = error
            if attempt < self._patience.attempts:
                pause_s = min(self._patience.backoff_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
                self._waits.wait(asyncio.sleep(pause_s))
        found = str(reason) or type(reason).__name__
        if isinstance(reason, TimeoutError):
            found = f"silence for {self._patience.timeout_s:g} s"
        raise RemoteError(
            f"{self.url}: nothing beyond byte {self._received} in {self._patience.attempts} attempts; the "
            f"last ended with: {found}; see to the server or the network, then resume"
        ) from reason

    def _new_bytes(self) -> bytes:
        while not self._is_over:
            if self._chunks is None:
                self._chunks = _chunks(self.url, self._received, self._patience.timeout_s)
            try:
                start, chunk = self._waits.wait(_next(self._chunks))
            except Exception:
                # With what it raises, a generator is over.
                self._chunks = None
                raise
            if start is None:
                self._require_all_came_again()
                self._is_over = True
                break
            new = chunk[max(0, self._received - start) :]
            self._connection_at = start + len(chunk)
            self._received += len(new)
            if new:
                return new
        return b""

    def _require_all_came_again(self) -> None:
        if self._connection_at < self._received:
            self._chunks = None
            raise EOFError(f"the end at byte {self._connection_at}, where more had come before")


class _FinalError(Exception):
    """An answer that further attempts will not change."""


def _chunks(url: str, start: int, timeout_s: float) -> _Chunks:
    """The bytes of a shard from `start` on, or from before it where there is no other way.

    Each with the place where it stands; at least one, if an empty one. Raises what went wrong, TimeoutError
    after a silence of `timeout_s`, _FinalError if it is for good.
    """
    if url.startswith("pipe:"):
        return _from_command(url.removeprefix("pipe:"), timeout_s)
    if url.startswith(("http://", "https://")):
        return _from_http(url, start, timeout_s)
    return _from_filesystem(url, start, timeout_s)


async def _from_command(command: str, timeout_s: float) -> _Chunks:
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_shell(
            command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=_CHUNK_BYTES,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            at = 0
            yield at, b""
            while chunk := await _in_time(process.stdout.read(_CHUNK_BYTES), timeout_s):
                yield at, chunk
                at += len(chunk)
            status = await _in_time(process.wait(), timeout_s)
        finally:
            if process.returncode is None:
                # The shell's children too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # A child that has left the group may keep the pipe open.
                with contextlib.suppress(TimeoutError):
                    await _in_time(process.wait(), _KILLED_S)
        if status:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 500))
            said = errors.read().decode(errors="replace").strip()
            raise OSError(f"status {status} of the command{f', which said: {said}' if said else ''}")


async def _from_http(url: str, start: int, timeout_s: float) -> _Chunks:
    # Bytes are counted as the server stores them.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    timeout = aiohttp.ClientTimeout(total=None, connect=timeout_s, sock_read=timeout_s)
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False) as session,
        session.get(url, headers=headers) as response,
    ):
        at = _first_byte(response, start)
        is_over = response.status == 416
        while not is_over:
            chunk, is_over, error = await _body_of(response)
            yield at, chunk
            at += len(chunk)
            if error:
                raise error
        yield at, b""


async def _body_of(response: aiohttp.ClientResponse) -> tuple[bytes, bool, Exception | None]:
    """The next part of an answer's body, whether it is the last, and what broke it off.

    aiohttp forgets what has arrived when the connection breaks: so as much as possible is taken at once.
    """
    parts: list[bytes] = []
    size = 0
    try:
        while size < _CHUNK_BYTES:
            part = await response.content.readany()
            if not part:
                return b"".join(parts), True, None
            parts.append(part)
            size += len(part)
    except (aiohttp.ClientError, OSError) as error:
        return b"".join(parts), True, error
    return b"".join(parts), False, None


def _first_byte(response: aiohttp.ClientResponse, start: int) -> int:
    """Where the body of an answer begins in the shard."""
    found = f"HTTP status {response.status} {response.reason}"
    content_range = response.headers.get("Content-Range", "")
    # All bytes had come, but not the end of the answer.
    if response.status == 416 and re.fullmatch(rf"bytes \*/{start}", content_range):
        return start
    # Too slow, too early, too many: these pass.
    if 400 <= response.status < 500 and response.status not in (408, 425, 429):
        raise _FinalError(found)
    if response.status not in (200, 206):
        raise OSError(found)
    if response.status == 206 and not content_range.startswith(f"bytes {start}-"):
        raise OSError(f"{found} with the range {content_range!r}, asked for one from {start}")
    return start if response.status == 206 else 0


async def _from_filesystem(url: str, start: int, timeout_s: float) -> _Chunks:
    filesystem, path = fsspec.core.url_to_fs(url)
    size = (await _in_time(_call(filesystem, "info", path), timeout_s))["size"]
    if size is None:
        raise _FinalError("the server does not say how long it is")
    yield start, b""
    while start < size:
        part = _call(filesystem, "cat_file", path, start=start, end=min(start + _RANGE_BYTES, size))
        chunk = await _in_time(part, timeout_s)
        if not chunk:
            raise EOFError(f"its end at byte {start} of {size}")
        yield start, chunk
        start += len(chunk)


async def _call(filesystem: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """A method of an fsspec filesystem: by its name for coroutines where it has one, else in a thread."""
    if filesystem.async_impl:
        return await getattr(filesystem, f"_{method}")(*args, **kwargs)
    return await asyncio.to_thread(getattr(filesystem, method), *args, **kwargs)


async def _in_time(coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    async with asyncio.timeout(timeout_s):
        return await coroutine


async def _next(chunks: _Chunks) -> tuple[int | None, bytes]:
    """The next chunk and its place; the place None after the last."""
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        return None, b""


class _Stopped(BaseException):
    """The consumer wants no more."""


class _Waits:
    """Where the reading thread waits for coroutines on fsspec's event loop, until it is told to stop."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._loop = get_loop()
        self._loop_thread: threading.Thread | None = None
        self._task: asyncio.Task[Any] | None = None

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result. Raises what it raises, and _Stopped as soon as it is stopped and over."""
        try:
            return asyncio.run_coroutine_threadsafe(self._noted(coroutine), self._loop).result()
        except concurrent.futures.CancelledError:
            raise _Stopped from None

    def finish(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> None:
        """Wait for what has to be done even after a stop."""
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def stop(self) -> None:
        self.is_stopped = True
        self._loop.call_soon_threadsafe(self._cancel)

    def is_needed_by_reader(self, thread: threading.Thread) -> bool:
        return thread is self._loop_thread

    async def _noted(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        # In the loop's thread, as is `_cancel`: neither can miss the other.
        self._loop_thread, self._task = threading.current_thread(), asyncio.current_task()
        try:
            if self.is_stopped:
                coroutine.close()
                raise asyncio.CancelledError
            return await coroutine
        finally:
            self._task = None

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _read_ahead(samples: Iterator[Sample], out: queue.Queue[Any], waits: _Waits) -> None:
    try:
        with contextlib.closing(samples):  # type: ignore[type-var]
            for sample in samples:
                _put(sample, out, waits)
    except _Stopped:
        pass
    except BaseException as error:
        with contextlib.suppress(_Stopped):
            _put(error, out, waits)


def _put(item: Any, out: queue.Queue[Any], waits: _Waits) -> None:
    # Asks from time to time, rather than being woken: garbage collection may stop it from any thread, even
    # one that holds the queue's lock.
    while not waits.is_stopped:
        with contextlib.suppress(queue.Full):
            return out.put(item, timeout=_NOTICE_S)
    raise _Stopped


def _end(waits: _Waits, reader: threading.Thread) -> None:
    waits.stop()
    here = threading.current_thread()
    # Garbage may be collected in the very threads that would be waited for.
    if here is not reader and not waits.is_needed_by_reader(here):
        reader.join()
