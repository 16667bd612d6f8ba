"""A progress bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from data_pipeline.common.terminal import printable

_REFRESH_S = 0.1


@contextmanager
def progress_bar(label: str, *, counts_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Return a callback for (done, total) that moves a bar on stderr, if stderr is a terminal.

    It draws in the caller's thread, because a process with threads cannot be forked safely.
    """
    console = Console(stderr=True)
    count: ProgressColumn = DownloadColumn() if counts_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task(printable(label), total=None)
        latest = 0.0

        def move(done: int, total: int) -> None:
            nonlocal latest
            is_due = time.monotonic() - latest > _REFRESH_S or done == total
            latest = time.monotonic() if is_due else latest
            bar.update(task, completed=done, total=total, refresh=is_due)

        yield move
