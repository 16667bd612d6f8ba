"""Training samples from WebDataset shards that are streamed from a server, and a cursor to resume from.

    urls       train-{000000..000099}.tar -> a sorted list of n shards
    order      position q of the infinite sequence of shards -> one of the n                pure
    ranks      rank r of W reads the positions q0 + r, q0 + r + W, q0 + r + 2 W, ...        pure
    samples    the shard's bytes (data_pipeline/streaming/connection.py) -> images and labels, by webdataset
    mix        windows of samples, each permuted by (seed, position, window)                pure
    queue      a thread reads ahead of the consumer by one window

A rank's state is two integers: the position of the shard that it reads, and the number of finished samples of
this shard. To resume, the rank streams the shard again from its start and drops that many samples. On another
number of ranks, all start at the smallest unfinished position: no shard is omitted, and only the shards that
were being read are repeated.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import tarfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand
from webdataset.tariterators import group_by_keys

from data_pipeline import philox, shuffle
from data_pipeline.common.redaction import canonical, redacted
from data_pipeline.formats.container import LARGEST_LABEL
from data_pipeline.formats.tar_index import label_of_cls, label_of_json
from data_pipeline.streaming.bounded_tar import LimitError, files_in, key_and_suffix
from data_pipeline.streaming.braces import require_few
from data_pipeline.streaming.connection import Patience, RemoteError, Stopped, Stream, Waits, require_reader

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MIX = 8
_NOTICE_S = 0.1


class Sample(NamedTuple):
    """An encoded image uint8 [n] and its label; `name` is for messages: the shard's URL and the key.

    `shard` is the position in the sequence of shards; `number` counts the shard's samples in their mixed
    order. `after` is the rank's row of the cursor after training on this sample.
    """

    encoded: np.ndarray
    label: int
    name: str
    shard: int
    number: int
    after: tuple[int, int]


def shard_urls(patterns: Sequence[str]) -> list[str]:
    """Return all shards that the patterns name, braces expanded ({000..099}, {a,b}), sorted.

    The order does not depend on credentials, which may differ when a run resumes: URLs that differ only in
    credentials stay in the order of the list.

    Raises ValueError if there is no shard or more than a million, if one is named twice, or if a URL has an
    unsupported protocol.
    """
    require_few(patterns)
    urls: list[str] = []
    for pattern in patterns:
        try:
            urls += braceexpand(pattern, escape=False)
        except ValueError as error:
            raise ValueError(
                f"data.shards: expected pairs of braces, found {redacted(pattern)[:200]!r}; "
                "correct its braces"
            ) from error
    urls.sort(key=canonical)
    if not urls:
        raise ValueError(
            f"expected the URLs of at least one shard, found none in {[*map(redacted, patterns)]}"
        )
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise ValueError(
            f"expected every shard once, found {len(twice)} repeated, first {redacted(twice[0])}; "
            "use patterns that do not overlap"
        )
    for url in urls:
        require_reader(url)
    return urls


def first_cursor(world_size: int) -> np.ndarray:
    """Return the cursor int64 [W, 2] of a new run."""
    return _started_at(0, world_size)


def resume(cursor_V2: np.ndarray, world_size: int) -> np.ndarray:
    """Return the cursor int64 [W, 2] with which `world_size` ranks resume from the cursor of V ranks.

    Row r is the position of the shard that rank r reads next, and the number of its finished samples. With
    W = V the cursor stays the same; else all ranks start at the smallest unfinished position.

    Raises ValueError if `cursor_V2` has another shape or type, or a negative entry.
    """
    cursor_V2 = np.asarray(cursor_V2)
    is_integer = np.issubdtype(cursor_V2.dtype, np.integer)
    if not is_integer or cursor_V2.ndim != 2 or cursor_V2.shape[1] != 2 or not cursor_V2.size:
        raise ValueError(
            f"expected a cursor of integers [ranks, 2], found {cursor_V2.dtype} {list(cursor_V2.shape)}"
        )
    if (cursor_V2 < 0).any():
        raise ValueError(f"expected a cursor of positions and counts from 0, found {cursor_V2.tolist()}")
    if len(cursor_V2) == world_size:
        return cursor_V2.astype(np.int64)
    return _started_at(int(cursor_V2[:, 0].min()), world_size)


def shard_of(seed: int, position: int, shards: int) -> int:
    """Return the number of the shard at a position of the infinite sequence."""
    return int(shuffle.record_of(seed, np.array([position]), shards)[0])


def mixed(seed: int, position: int, window_number: int, samples: int) -> np.ndarray:
    """Return the order int64 [samples] of the samples in a window of a shard."""
    at_N = (position << 32) + np.arange(samples, dtype=np.int64)
    high_N, low_N, *_ = philox.words(seed, at_N, _MIX << 32 | window_number)
    return np.lexsort((low_N, high_N))


class RemoteSamples:
    """Single-use, endless iterator over the samples of one rank; a thread reads ahead.

    Windows of `window` samples are mixed; up to three times as many encoded images are held in memory. A
    sample of more than `max_sample_bytes` is an error.
    `cursor` is that of a checkpoint, int64 [V, 2] for any number V of ranks, None at the start of a run;
    `start` is this rank's row of it. A read error is raised as RemoteError, after the samples before it have
    been returned. `close` ends the thread; garbage collection and the end of the interpreter do so too.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        seed: int,
        rank: int,
        world_size: int,
        window: int,
        max_sample_bytes: int = 64 << 20,
        cursor: np.ndarray | None = None,
        patience: Patience = Patience(),  # noqa: B008 - immutable
    ) -> None:
        _require_valid(urls, rank, world_size, window)
        cursor_W2 = first_cursor(world_size) if cursor is None else resume(cursor, world_size)
        position, done = self.start = tuple(cursor_W2[rank].tolist())
        self._waits = waits = Waits()
        samples = _endless(
            list(urls), seed, position, done, world_size, window, max_sample_bytes, patience, waits
        )
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=window)
        # The thread holds no reference to this object, so that the object can be garbage-collected.
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
        # The end or the error stays in the queue for further calls.
        self._queue.put(item)
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> RemoteSamples:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading thread, close its connection and end the iteration."""
        self._finalizer()
        # A consumer in another thread may be waiting.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)


def _started_at(position: int, world_size: int) -> np.ndarray:
    cursor_W2 = np.zeros((world_size, 2), np.int64)
    cursor_W2[:, 0] = position + np.arange(world_size)
    return cursor_W2


def _require_valid(urls: Sequence[str], rank: int, world_size: int, window: int) -> None:
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
    most_bytes: int,
    patience: Patience,
    waits: Waits,
) -> Iterator[Sample]:
    """Yield the samples of a rank, from sample number `done` of the shard at `position` on."""
    while True:
        number = shard_of(seed, position, len(urls))
        with contextlib.closing(Stream(urls[number], patience, waits)) as stream:
            if urls[number].startswith("pipe:"):  # the name does not tell one command from another
                stream.name += f" (shard {number})"
            yield from _of_shard(stream, seed, position, done, position + world_size, window, most_bytes)
        position, done = position + world_size, 0


def _of_shard(
    stream: Stream, seed: int, position: int, done: int, next_position: int, window: int, most_bytes: int
) -> Iterator[Sample]:
    first = 0
    for window_number, (window_samples, is_last) in enumerate(_windows(_decoded(stream, most_bytes), window)):
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
        raise RemoteError(f"{stream.name}: expected samples, found an empty archive; remove it from the list")
    if first <= done:
        raise RemoteError(
            f"{stream.name}: expected more than the {done} samples that the checkpoint counts as finished, "
            f"found {first}: the shard has changed; restore the shards, their list and the seed"
        )


def _windows(items: Iterator[Any], size: int) -> Iterator[tuple[list[Any], bool]]:
    """Yield windows of `size` items, each with a flag that is True for the last window."""
    window = list(itertools.islice(items, size))
    while window:
        following = list(itertools.islice(items, 1))
        yield window, not following
        window = following + list(itertools.islice(items, size - 1)) if following else []


def _decoded(stream: Stream, most_bytes: int) -> Iterator[tuple[np.ndarray, int, str]]:
    """Yield image, label and name of all samples of a shard, in their order in the file."""
    try:
        for members in group_by_keys(_files(stream, most_bytes), key_and_suffix):
            # A group with neither image nor .cls is not a sample but perhaps a description of the shard.
            if "cls" in members or any(suffix in members for suffix in _IMAGE_SUFFIXES):
                yield _image_and_label(members, f"{stream.name}: sample {members['__key__']!r}")
    except RemoteError:
        raise
    except LimitError as error:
        raise RemoteError(
            f"{stream.name}: {error}, before byte {stream.at}; write the shard again"
        ) from error
    except (tarfile.TarError, ValueError) as error:
        # webdataset appends its own text to the message.
        reason = str(error.args[0]).partition(" @ ")[0]
        raise RemoteError(
            f"{stream.name}: expected an uncompressed tar archive, found damage at byte {stream.at} or "
            f"before: {reason}; copy it to the server again"
        ) from error


def _files(stream: Stream, most_bytes: int) -> Iterator[dict[str, Any]]:
    for file in files_in(stream, most_bytes):
        yield {"__url__": stream.name, **file}
    stream.require_end_of_archive()


def _image_and_label(members: dict[str, Any], name: str) -> tuple[np.ndarray, int, str]:
    images = [members[suffix] for suffix in _IMAGE_SUFFIXES if suffix in members]
    if len(images) != 1 or not images[0]:
        found = f"{len(images)} images" if len(images) != 1 else "an empty one"
        raise RemoteError(
            f"{name}: expected one image (.{', .'.join(_IMAGE_SUFFIXES)}), found {found}; write it again"
        )
    return np.frombuffer(images[0], np.uint8), _label(members, name), name


def _label(members: dict[str, Any], name: str) -> int:
    """Return the label in .cls, else "label" or "cls" in .json."""
    text: bytes | None = members.get("cls", members.get("json"))
    label = None
    with contextlib.suppress(ValueError):  # more digits than Python takes
        label = label_of_cls(members["cls"]) if "cls" in members else label_of_json(text or b"{}")
    if label is None or not 0 <= label <= LARGEST_LABEL:
        raise RemoteError(
            f"{name}: expected a whole number from 0 to {LARGEST_LABEL} in .cls, or as 'label' or 'cls' in "
            f".json, found {'neither' if text is None else repr(text[:80])}; write it again"
        )
    return label


def _read_ahead(samples: Iterator[Sample], out: queue.Queue[Any], waits: Waits) -> None:
    try:
        with contextlib.closing(samples):  # type: ignore[type-var]
            for sample in samples:
                _put(sample, out, waits)
    except Stopped:
        pass
    except BaseException as error:
        with contextlib.suppress(Stopped):
            _put(error, out, waits)


def _put(item: Any, out: queue.Queue[Any], waits: Waits) -> None:
    # Poll instead of waiting for a notification: garbage collection may stop the reader from any thread, even
    # from one that holds the queue's lock.
    while not waits.is_stopped:
        with contextlib.suppress(queue.Full):
            return out.put(item, timeout=_NOTICE_S)
    raise Stopped


def _end(waits: Waits, reader: threading.Thread) -> None:
    waits.stop()
    here = threading.current_thread()
    # Garbage collection may run in the reader itself, or in the thread for which the reader waits.
    if here is not reader and not waits.is_needed_by_reader(here):
        reader.join()
