"""The bytes of one shard from afar, whatever happens to the connection.

    pipe:, http(s)://, a local path or any URL of fsspec -> one unbroken stream

A connection that breaks or stalls is made anew and goes on at the byte where it stopped. A shard that ends
before the end of its archive is an error, never a shorter shard. Connections live on fsspec's event loop; the
thread that reads waits for it, until it is told to stop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import re
import signal
import tarfile
import tempfile
import threading
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import get_loop

_Chunks = AsyncGenerator[tuple[int, bytes], None]

_ZEROS = bytes(tarfile.BLOCKSIZE)
_CHUNK_BYTES = 1 << 20
# An object store answers every range with a request of its own.
_RANGE_BYTES = 8 << 20
_LONGEST_PAUSE_S = 60.0
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


def require_reader(url: str) -> None:
    """Raises ValueError for a URL that cannot be read here."""
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


class Stream:
    """The bytes of one shard as webdataset reads them, whatever happens to the connection."""

    def __init__(self, url: str, patience: Patience, waits: Waits) -> None:
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
        """Let the connection go."""
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


class Stopped(BaseException):
    """The consumer wants no more."""


class Waits:
    """Where the reading thread waits for coroutines on fsspec's event loop, until it is told to stop."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._loop = get_loop()
        self._loop_thread: threading.Thread | None = None
        self._task: asyncio.Task[Any] | None = None

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result. Raises what it raises, and Stopped as soon as it is stopped and over."""
        try:
            return asyncio.run_coroutine_threadsafe(self._noted(coroutine), self._loop).result()
        except concurrent.futures.CancelledError:
            raise Stopped from None

    def finish(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> None:
        """Wait for what has to be done even after a stop."""
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def stop(self) -> None:
        """Cancel what is waited for; may be called from any thread."""
        self.is_stopped = True
        self._loop.call_soon_threadsafe(self._cancel)

    def is_needed_by_reader(self, thread: threading.Thread) -> bool:
        """Whether the coroutines run in this thread, which must not wait for the reader then."""
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
