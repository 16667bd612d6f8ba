"""Asynchronous checkpoints: training waits only for a copy of the state, which a thread then writes.

    prepare    allocate the copy                                                  once, before the first step
    save       wait for the previous save, or skip this one; copy; start the thread        at a step boundary
    must_retry report the result of a finished save; True if it must be retried                  periodically

Each rank copies and writes its rows of the head and its share of the replicated tensors. The thread's
collectives use a process group of their own. A save that fails does not end the training, except the save of
the last step.
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

from trainer.checkpoint import sharded
from trainer.checkpoint.directory import CheckpointError, Header
from trainer.checkpoint.sharded import State
from trainer.config import CheckpointConfig
from trainer.monitoring.prometheus import Metrics

# The longest wait for the slowest rank to write its part; a rank that has exited is detected at once.
_WRITING_TIMEOUT = timedelta(hours=2)


class Saver:
    """Saver of a run's state on all ranks of `group`; all ranks must call every method together.

    `say` prints a line for the user on one rank.
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
        self._has_failed = False  # the last attempted save
        self._last_step: int | None = None  # the step of the last attempted save

    def prepare(self, state: State) -> None:
        """Allocate the memory for copies of `state`; page faults cost more than the copy itself."""
        self._copy(state)

    def save(self, state: Callable[[], State], header: Header, *, is_last: bool = False) -> None:
        """Copy the state and start a thread that writes it.

        state: called once the memory for the copy is free. If the previous save is still running,
        checkpoint.when_busy decides whether to wait for it or to skip this save. The last save is never
        skipped, and it is on the disk when this method returns.

        Raises CheckpointError if the last save fails.
        """
        if not self._is_done() and self._config.when_busy == "skip" and not is_last:
            self._say(
                f"step {header.step} is not saved: the previous save is still running (checkpoint.when_busy)"
            )
            return
        self._finish()
        copied = self._copy(state())
        self._last_step = header.step
        self._writing = _Writing(lambda: self._write(copied, header))
        if is_last:
            self._finish(is_last=True)

    def must_retry(self) -> bool:
        """Report the result if the save has finished; return True if it failed and must be retried."""
        if not self._is_done():
            return False
        self._finish()
        return self._has_failed

    def wait(self) -> None:
        """Wait for the running save, if any, and report its result."""
        self._finish()

    def has_saved(self, step: int) -> bool:
        """Return True if the last save was of `step` and is on the disk; wait for it if it is running."""
        self._finish()
        return self._last_step == step and not self._has_failed

    def close(self) -> None:
        """Wait for the running save, if any, and destroy the process group; no save may follow."""
        self._finish()
        dist.destroy_process_group(self._own)
        # The group's threads end with the last reference, and they must end before Python's teardown. The
        # traceback of a failed save holds a reference too, in a cycle that only the collector removes.
        del self._own, self._mesh
        gc.collect()

    def _finish(self, *, is_last: bool = False) -> None:
        """Wait for the running save, if any, and report its result; raise its error if it is the last."""
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
                self._say(f"{error}. Training continues, and the save is retried every log_every_steps")
            return
        self._has_failed = False
        self._metrics.checkpoint_s.observe(writing.seconds)
        self._say(f"saved {path}")

    def _is_done(self) -> bool:
        """Return True on all ranks if no rank is writing."""
        if self._writing is None:  # the same on all ranks
            return True
        is_running = torch.tensor(int(self._writing.is_running()))
        dist.all_reduce(is_running, op=dist.ReduceOp.MAX, group=self._group)
        return not is_running.item()

    @torch.no_grad()
    def _copy(self, state: State) -> State:
        """Copy this rank's part of a state to reused memory, which is pinned if there is a GPU."""
        rank, size = self._group.rank(), self._group.size()
        copied: State = {}
        for part, tensors in sharded.share_out(state, rank, size).items():
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
        return sharded.save(
            self._run_dir,
            copied,
            header,
            keep=self._config.keep,
            keep_every_steps=self._config.keep_every_steps,
            group=self._own,
        )


class _Writing:
    """A write that runs in a thread."""

    def __init__(self, function: Callable[[], Path]) -> None:
        self.seconds = 0.0
        self._function = function
        self._path: Path | None = None
        self._error: BaseException | None = None
        # Not a daemon thread: a process that ends normally completes the write first.
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def is_running(self) -> bool:
        """Return True while the thread runs.

        Raises the function's error, unless it is a CheckpointError, which all ranks have and `result` raises.
        """
        is_alive = self._thread.is_alive()
        if not is_alive and not isinstance(self._error, CheckpointError | None):
            raise self._error
        return is_alive

    def result(self) -> Path:
        """Wait for the function, and return its result or raise its error."""
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
