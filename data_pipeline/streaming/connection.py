"""The bytes of one remote shard as a stream that survives connection failures.

    pipe:, http(s)://, a local path or any URL of fsspec -> one unbroken stream

If a connection breaks or stalls, the stream reconnects and resumes at the byte where it stopped. A shard that
ends before the end of its archive is an error. Connections run on fsspec's event loop; the reading thread
waits for them until it is stopped.
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
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import IO, Any, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import get_loop

from data_pipeline.common.redaction import redacted, redacted_text

_Chunks = AsyncGenerator[tuple[int, bytes], None]

_ZEROS = bytes(tarfile.BLOCKSIZE)
_CHUNK_BYTES = 1 << 20
# Every range from an object store costs one request.
_RANGE_BYTES = 8 << 20
# tar fills its last record, of some kB, with zeros; some tape formats have records of several MB.
_LONGEST_PADDING = 64 << 20
_LONGEST_PAUSE_S = 60.0
_KILLED_S = 1.0
_OUTPUT_BYTES = 1 << 16
# Runs the command in the variable LGAF_COMMAND: other users can read the arguments of a process, not its
# environment. A guard beside it kills the process group when standard input ends, which it does even if this
# process is killed or exits without cleaning up.
_GUARDED = """
exec 3<&0
{ read -r _; kill -KILL 0; } <&3 3<&- >&- 2>&- &
exec 3<&- </dev/null
/bin/sh -c 'eval "unset LGAF_COMMAND
$LGAF_COMMAND"'
status=$?
{ kill -KILL $!; wait $!; } 2>/dev/null
exit $status
"""


class RemoteError(ValueError):
    """A shard cannot be read, is truncated, or has an incomplete sample; the message names it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self._message = message

    def __str__(self) -> str:
        # webdataset extends the arguments of every exception that passes through it.
        return self._message


class Patience(NamedTuple):
    """Retry limits: `attempts` in a row without a new byte, and `timeout_s` seconds without data.

    The pause before the second attempt is `backoff_s` seconds; it doubles before each further attempt, up to
    a minute.
    """

    attempts: int = 10
    timeout_s: float = 60.0
    backoff_s: float = 1.0


def require_reader(url: str) -> None:
    """Raise ValueError for a URL that cannot be read with the installed packages."""
    if url.startswith(("pipe:", "http://", "https://")):
        return
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        how = "pip install 'lgaf[s3]'" if protocol in ("s3", "s3a") else error
        raise ValueError(
            f"{redacted(url)}: a package that reads {protocol}:// is not installed: {how}"
        ) from error
    except ValueError as error:
        # Everything before "://" is the protocol, even a command.
        found = f"{protocol}://" if re.fullmatch(r"[a-z][a-z\d+.-]{0,15}", protocol) else "another text"
        raise ValueError(
            f"{redacted(url)}: expected pipe:, http://, https://, a local path or a protocol of fsspec, "
            f"found {found}; correct it"
        ) from error


class Stream:
    """File-like object for webdataset with the bytes of one shard; it reconnects after failures.

    `name` is the URL without credentials, for messages.
    """

    def __init__(self, url: str, patience: Patience, waits: Waits) -> None:
        self._url, self.name, self._patience, self._waits = url, redacted(url), patience, waits
        self._chunks: _Chunks | None = None
        self._received = self._connection_at = 0
        self._buffer, self._used = b"", 0
        self._is_over = False
        self._last_block = b""

    @property
    def at(self) -> int:
        """The number of bytes that have been returned."""
        return self._received - len(self._buffer) + self._used

    def read(self, _: int = -1) -> bytes:
        """Return the next tar block, whatever size is requested; empty at the end.

        The size is one block so that the last block read is the one at which tarfile stopped.
        """
        while len(self._buffer) - self._used < tarfile.BLOCKSIZE and (chunk := self._fetch()):
            self._buffer, self._used = self._buffer[self._used :] + chunk, 0
        block = self._buffer[self._used : self._used + tarfile.BLOCKSIZE]
        self._used += len(block)
        self._last_block = block
        return block

    def require_end_of_archive(self) -> None:
        """Read to the end of the stream. Raises RemoteError if the archive does not end in zeros.

        tarfile stops without an error at a header that is truncated or damaged.
        """
        if self._last_block != _ZEROS:
            raise RemoteError(
                f"{self.name}: expected an uncompressed tar archive up to its closing blocks of zeros, found "
                f"{'its end' if self._is_over else 'no header'} at byte {self.at}: "
                "it is truncated, damaged or compressed; copy it to the server again"
            )
        end = self.at
        while block := self.read():
            if self.at - end > _LONGEST_PADDING:
                raise RemoteError(
                    f"{self.name}: expected at most {_LONGEST_PADDING} zeros after the end of the archive, "
                    "found more; write the shard again"
                )
            if block.strip(b"\0"):
                raise RemoteError(
                    f"{self.name}: expected nothing after the end of the archive, found more at byte "
                    f"{self.at - len(block)}; do not concatenate archives, write one archive per shard"
                )

    def close(self) -> None:
        """Close the connection."""
        if self._chunks is not None:
            self._waits.finish(self._chunks.aclose(), self._patience.timeout_s)
            self._chunks = None

    def _fetch(self) -> bytes:
        """Return new bytes, none at the end; reconnect up to the limit of attempts."""
        for attempt in range(1, self._patience.attempts + 1):
            try:
                return self._new_bytes()
            except (_FinalError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
                found = redacted_text(str(error), self._url)
                raise RemoteError(f"{self.name}: cannot be read: {found}") from error
            # fsspec does not document the exceptions of its filesystems on network failures.
            except Exception as error:
                reason = error
            if attempt < self._patience.attempts:
                pause_s = min(self._patience.backoff_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
                self._waits.wait(asyncio.sleep(pause_s))
        found = redacted_text(str(reason), self._url) or type(reason).__name__
        if isinstance(reason, TimeoutError):
            found = f"no data for {self._patience.timeout_s:g} s"
        raise RemoteError(
            f"{self.name}: expected more bytes, found none beyond byte {self._received} in "
            f"{self._patience.attempts} attempts; the last attempt failed with: {found}; "
            "check the server and the network, then resume"
        ) from reason

    def _new_bytes(self) -> bytes:
        while not self._is_over:
            if self._chunks is None:
                self._chunks = _chunks(self._url, self._received, self._patience.timeout_s)
            try:
                start, chunk = self._waits.wait(_next(self._chunks))
            except Exception:
                # A generator cannot continue after an exception.
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
            raise EOFError(
                f"the shard ended at byte {self._connection_at}, after an earlier connection had sent "
                f"{self._received} bytes"
            )


class _FinalError(Exception):
    """A response that further attempts will not change."""


def _chunks(url: str, start: int, timeout_s: float) -> _Chunks:
    """Return a generator of (offset, bytes) of a shard, from `start` on or from an earlier byte.

    There is at least one chunk, which may be empty. The generator raises the error of the connection,
    TimeoutError after `timeout_s` without data, and _FinalError for an error that will not pass.
    """
    if url.startswith("pipe:"):
        return _from_command(url, timeout_s)
    if url.startswith(("http://", "https://")):
        return _from_http(url, start, timeout_s)
    return _from_filesystem(url, start, timeout_s)


async def _from_command(url: str, timeout_s: float) -> _Chunks:
    with tempfile.TemporaryFile() as errors, _lifeline() as lifeline:
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _GUARDED),
            env=os.environ | {"LGAF_COMMAND": url.removeprefix("pipe:")},
            stdin=lifeline,
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
                # The group includes the shell's children.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # A child that has left the group may keep the pipe open, so the wait has a limit.
                with contextlib.suppress(TimeoutError):
                    await _in_time(process.wait(), _KILLED_S)
        if status:
            output = _end_of(errors, url)
            raise OSError(f"status {status} of the command{f', with the output: {output}' if output else ''}")


def _end_of(file: IO[bytes], url: str) -> str:
    """Return the last 500 characters of a command's output, without credentials and without half a word.

    A credential that is cut is no longer recognised, so it is removed before the text is cut.
    """
    skipped = max(0, file.seek(0, os.SEEK_END) - _OUTPUT_BYTES)
    file.seek(skipped)
    text = file.read().decode(errors="replace")
    text = redacted_text(text.partition("\n")[2] if skipped else text, url).strip()
    return text if len(text) <= 500 else "".join(text[-500:].split(None, 1)[1:])


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """Open a pipe to which nothing is written and return its reading end; it ends with this process."""
    ends = os.pipe()
    try:
        yield ends[0]
    finally:
        for end in ends:
            os.close(end)


async def _from_http(url: str, start: int, timeout_s: float) -> _Chunks:
    # Offsets count the bytes that the server stores, so the response must not be compressed.
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
    """Return the next part of a response's body, True if it is the last part, and the error that ended it.

    aiohttp discards received data when the connection breaks, so each call takes as much as has arrived.
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
    """Return the offset in the shard at which the body of a response begins."""
    found = f"HTTP status {response.status} {response.reason}"
    content_range = response.headers.get("Content-Range", "")
    # All bytes had arrived, but not the end of the response.
    if response.status == 416 and re.fullmatch(rf"bytes \*/{start}", content_range):
        return start
    # Request timeout (408), too early (425) and too many requests (429) are temporary.
    if 400 <= response.status < 500 and response.status not in (408, 425, 429):
        raise _FinalError(found)
    if response.status not in (200, 206):
        raise OSError(found)
    if response.status == 206 and not content_range.startswith(f"bytes {start}-"):
        raise OSError(f"{found} with the range {content_range!r}, expected one from byte {start}")
    return start if response.status == 206 else 0


async def _from_filesystem(url: str, start: int, timeout_s: float) -> _Chunks:
    filesystem, path = fsspec.core.url_to_fs(url)
    size = (await _in_time(_call(filesystem, "info", path), timeout_s))["size"]
    if size is None:
        raise _FinalError("the server does not report the shard's size")
    yield start, b""
    while start < size:
        part = _call(filesystem, "cat_file", path, start=start, end=min(start + _RANGE_BYTES, size))
        chunk = await _in_time(part, timeout_s)
        if not chunk:
            raise EOFError(f"the shard ended at byte {start} of {size}")
        yield start, chunk
        start += len(chunk)


async def _call(filesystem: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of an fsspec filesystem: its coroutine variant if it has one, else in a thread."""
    if filesystem.async_impl:
        return await getattr(filesystem, f"_{method}")(*args, **kwargs)
    return await asyncio.to_thread(getattr(filesystem, method), *args, **kwargs)


async def _in_time(coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    async with asyncio.timeout(timeout_s):
        return await coroutine


async def _next(chunks: _Chunks) -> tuple[int | None, bytes]:
    """Return the offset of the next chunk and the chunk; the offset is None after the last chunk."""
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        return None, b""


class Stopped(BaseException):
    """The consumer has stopped the reading."""


class Waits:
    """Waits of the reading thread for coroutines on fsspec's event loop, which `stop` ends."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._loop = get_loop()
        self._loop_thread: threading.Thread | None = None
        self._task: asyncio.Task[Any] | None = None

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return the coroutine's result. Raises its exception, and Stopped once it has been cancelled."""
        try:
            return asyncio.run_coroutine_threadsafe(self._noted(coroutine), self._loop).result()
        except concurrent.futures.CancelledError:
            raise Stopped from None

    def finish(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> None:
        """Wait for a coroutine that must run even after a stop."""
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def stop(self) -> None:
        """Cancel the coroutine in progress; may be called from any thread."""
        self.is_stopped = True
        self._loop.call_soon_threadsafe(self._cancel)

    def is_needed_by_reader(self, thread: threading.Thread) -> bool:
        """Return True for the thread that runs the coroutines: it must not wait for the reader."""
        return thread is self._loop_thread

    async def _noted(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        # This runs in the loop's thread, as does `_cancel`, so neither can miss the other.
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
