"""Saving while training goes on: a step is held up for a copy of the state, which a thread then writes.

    prepare    allocate the copy                                        once, before the first step
    save       wait for the save before it, or skip this one; copy; start the thread        at a step boundary
    look       has it been written? Say so, or say why not; True if it is to be tried again       now and then

The copy is kept and used again, in pinned memory where there is a GPU. Each rank copies its rows of the head
and its part of what all ranks hold, and writes them in a thread whose collectives have a process group of
their own. What the ranks do next depends on whether all their threads are done: one small reduction, on the
training's group, between steps.

A save that fails does not end the training, but for that of the last step.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.checkpoint import sharded as checkpoint
from trainer.checkpoint.directory import CheckpointError, Header
from trainer.checkpoint.sharded import State
from trainer.config import CheckpointConfig
from trainer.monitoring.prometheus import Metrics

# A rank waits that long for the slowest to write its part; one that is gone is noticed at once.
_WRITING_TIMEOUT = timedelta(hours=2)


class Saver:
    """Saves the state of a run, on all ranks of `group` together; every method is called by all of them.

    `say` shows a line to the user on one rank.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        *,
        group: dist.ProcessGroup,
        metrics: Metrics,
        say: Callable[[str], None],
    ) -> None:
        self._run_dir, self._config, self._group = run_dir, config, group
        self._metrics, self._say = metrics, say
        self._own = dist.new_group(
            dist.get_process_group_ranks(group), backend="gloo", timeout=_WRITING_TIMEOUT
        )
        self._mesh = DeviceMesh.from_group(self._own, "cpu")
        self._copies: dict[tuple[str, str], torch.Tensor] = {}
        self._writing: _Writing | None = None
        self._has_failed = False  # the last one that was tried
        self._last_step: int | None = None  # of that one

    def prepare(self, state: State) -> None:
        """Allocate the memory for copies of `state`: new pages cost more than the copy."""
        self._copy(state)

    def save(self, state: Callable[[], State], header: Header, *, is_last: bool = False) -> None:
        """Copy the state, which is asked for when there is room for it, and have it written.

        If the save before it still runs, wait for it or skip this one, as configured. The last save is never
        skipped, and is written when this returns; CheckpointError if that is not possible.
        """
        if not self._is_done() and self._config.when_busy == "skip" and not is_last:
            self._say(f"step {header.step} is not saved: an earlier save still runs (checkpoint.when_busy)")
            return
        self._finish()
        copied = self._copy(state())
        self._last_step = header.step
        self._writing = _Writing(lambda: self._write(copied, header))
        if is_last:
            self._finish(is_last=True)

    def look(self) -> bool:
        """Take over the result if the save is over; True if it failed and is to be tried again."""
        if not self._is_done():
            return False
        self._finish()
        return self._has_failed

    def wait(self) -> None:
        """Wait for the save that runs, if any, and take over its result."""
        self._finish()

    def has_saved(self, step: int) -> bool:
        """Whether the last save was of `step` and is on the disk; waits for it if it runs."""
        self._finish()
        return self._last_step == step and not self._has_failed

    def close(self) -> None:
        """Wait for the save that runs, if any, and let go of the process group: nothing is saved after it."""
        self._finish()
        dist.destroy_process_group(self._own)
        # Its threads end with the last reference; they must not live on when Python ends. The traceback of a
        # save that failed has one too, in a cycle.
        del self._own, self._mesh
        gc.collect()

    def _finish(self, *, is_last: bool = False) -> None:
        """Wait for the save that runs, if any; its result is counted and said or, if the last, raised."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        was_failing, self._has_failed = self._has_failed, True
        try:
            path = writing.result()
        except CheckpointError as error:
            self._metrics.failed_checkpoints.inc()
            if is_last:
                raise
            if not was_failing:
                self._say(f"{error}. Training goes on, and tries again every log_every_steps")
            return
        self._has_failed = False
        self._metrics.checkpoint_s.observe(writing.seconds)
        self._say(f"saved {path}")

    def _is_done(self) -> bool:
        """Whether no rank writes; alike on all ranks."""
        if self._writing is None:  # on all ranks or on none
            return True
        is_running = torch.tensor(int(self._writing.is_running()))
        dist.all_reduce(is_running, op=dist.ReduceOp.MAX, group=self._group)
        return not is_running.item()

    @torch.no_grad()
    def _copy(self, state: State) -> State:
        """This rank's part of a state, copied to memory that is this object's own and used again."""
        rank, size = self._group.rank(), self._group.size()
        copied: State = {}
        for part, tensors in checkpoint.share_out(state, rank, size).items():
            copied[part] = {name: self._copy_tensor((part, name), tensor) for name, tensor in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy_tensor(self, key: tuple[str, str], tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if key not in self._copies:
            self._copies[key] = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        copy = self._copies[key].copy_(source, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return copy
        return DTensor.from_local(
            copy, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _write(self, copied: State, header: Header) -> Path:
        return checkpoint.save(
            self._run_dir,
            copied,
            header,
            keep=self._config.keep,
            keep_every_steps=self._config.keep_every_steps,
            group=self._own,
        )


class _Writing:
    """A function that runs in a thread."""

    def __init__(self, function: Callable[[], Path]) -> None:
        self.seconds = 0.0
        self._function = function
        self._path: Path | None = None
        self._error: BaseException | None = None
        # Not a daemon: a process that ends by itself finishes what it writes.
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def is_running(self) -> bool:
        """Raises what the function has raised, unless that was CheckpointError, of which all ranks know."""
        is_alive = self._thread.is_alive()
        if not is_alive and not isinstance(self._error, CheckpointError | None):
            raise self._error
        return is_alive

    def result(self) -> Path:
        """Wait for the function; what it returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._path = self._function()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - started
