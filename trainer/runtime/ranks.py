"""Who am I among the ranks: the only reader of rank variables, and the one place where a failed rank speaks.

    with join() as ranks:      torchrun, Slurm's srun, or alone; nobody says which
        ...                    ranks.rank, ranks.group, ranks.device

A rank that fails says so and leaves at once. Its connections close, which wakes the others from whatever
they wait for (and torchrun or srun ends those that it does not wake); they leave without another word. A rank
that cannot say anything, as it was killed or hangs, is named by another: `watchdog` finds out which it is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from trainer.runtime.watchdog import HangError, Pulse

# Ports below the range from which Linux hands out its own (32768 and up).
_FIRST_PORT, _PORTS = 15_000, 16_000
_JOIN_TIMEOUT = timedelta(minutes=10)
_FLUSH_S = 5.0
_CLOSED = r"onnection (closed|reset)|Broken pipe"


@dataclass(frozen=True)
class Placement:
    """Where one process stands: its rank among `world_size`, and its rank among those of its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int


@dataclass(frozen=True)
class Ranks:
    """The ranks of this run, those of `group`; one process alone is a group of one."""

    placement: Placement
    group: dist.ProcessGroup
    device: torch.device
    pulse: Pulse

    @property
    def rank(self) -> int:
        """This process among all, from 0."""
        return self.placement.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.placement.world_size

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes and shows what is said once."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """True on one rank of each node."""
        return self.placement.local_rank == 0

    @property
    def device_id(self) -> int | None:
        """The GPU's number, None on the CPU."""
        return self.device.index if self.device.type == "cuda" else None


def placement(env: Mapping[str, str]) -> Placement:
    """Read torchrun's variables, else srun's, else be alone.

    Inside a Slurm batch script without srun (SLURM_JOB_ID is set, SLURM_STEP_ID is not) a process is alone.
    """
    if "RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        return Placement(
            rank,
            world_size,
            int(env.get("LOCAL_RANK", rank)),
            int(env.get("LOCAL_WORLD_SIZE", world_size)),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        node = int(env["SLURM_NODEID"])
        port = _FIRST_PORT + (131 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % _PORTS
        return Placement(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env["SLURM_LOCALID"]),
            tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node],
            first_host(env["SLURM_STEP_NODELIST"]),
            port,
        )
    return Placement(0, 1, 0, 1, "127.0.0.1", 0)


def first_host(node_list: str) -> str:
    """The first name of a Slurm node list: `gpu[003-005,9],login1` gives `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, expected names such as 'node[01-04]'")
    return "".join(part or "" for part in match.groups())


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of the tasks of every node: `2(x3),1` gives [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, expected a form such as '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other ranks, and part from them in order at the end.

    An exception inside the block is shown by the first rank that fails and ends the process with exit code 1.
    """
    where = placement(os.environ)
    try:
        store = _store(where)
    except (dist.DistError, OSError) as error:
        _show(
            ValueError(
                f"the ranks cannot meet at {where.master_address}:{where.master_port}: {error}; see that "
                "rank 0 runs, that its name resolves on every node, and that no other program has the port"
            ),
            where,
        )
        _end(1)
    with _speak_once(where, store) as pulse:
        device = _device(where)
        # DeepSpeed insists on this variable, which only torchrun sets.
        os.environ["LOCAL_RANK"] = str(where.local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=where.rank,
            world_size=where.world_size,
            device_id=device if device.type == "cuda" else None,
        )
        group = dist.group.WORLD
        assert group is not None
        yield Ranks(where, group, device, pulse)
        # Rank 0 may host the store: nobody leaves while another still needs it.
        dist.barrier()
        dist.destroy_process_group()


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return what each rank of `group` brings, on all of them; JSON, which unlike a pickle runs nothing."""
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    longest = int(max(sizes))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    dist.all_gather(texts, padded, group=group)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def from_first(value: Any, group: dist.ProcessGroup) -> Any:
    """Return what rank 0 of `group` brings, on all ranks, as JSON."""
    return gather_json(value if group.rank() == 0 else None, group)[0]


def _store(where: Placement) -> dist.Store:
    if where.world_size == 1:
        return dist.HashStore()
    store = dist.TCPStore(
        where.master_address,
        where.master_port,
        where.world_size,
        # torchrun keeps the store in its agent, so that it outlives restarted ranks.
        is_master=where.rank == 0 and not _has_agent_store(),
        timeout=_JOIN_TIMEOUT,
        wait_for_workers=False,
    )
    # That store has seen the ranks of every attempt, each of which must meet and fail for itself.
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _device(where: Placement) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", where.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _speak_once(where: Placement, store: dist.Store) -> Iterator[Pulse]:
    once = threading.Lock()

    def end(error: Exception) -> NoReturn:
        once.acquire()  # and not released: who comes second, main thread or watchdog, waits for the end
        _speak(error, where, pulse)
        # An orderly exit would wait for collectives in which nobody else takes part any more.
        _end(1)

    keeper = "torchrun" if _has_agent_store() else "rank 0"
    pulse = Pulse(store, where.rank, where.world_size, keeper=keeper, end=end)
    try:
        with pulse:
            yield pulse
    except Exception as error:
        end(error)


def _speak(error: Exception, where: Placement, pulse: Pulse) -> None:
    """Show the error, or the rank that caused it, unless another rank has the word."""
    # A rank that was killed is known by its connections, which closed.
    is_cut_off = isinstance(error, RuntimeError) and re.search(_CLOSED, str(error)) is not None
    verdict = pulse.verdict(is_other_at_fault=is_cut_off or isinstance(error, HangError))
    if not verdict.is_speaker:
        return
    if isinstance(error, HangError):
        error = ValueError(f"{error}; {verdict.culprit}")
    elif verdict.culprit:
        error = ValueError(
            f"another rank ended without a word (killed, or out of memory?): {verdict.culprit}"
        )
    _show(error, where)


def _show(error: Exception, where: Placement) -> None:
    """What went wrong, for a user; with the way there only if it is no one's input that is at fault."""
    who = f"rank {where.rank}: " if where.world_size > 1 else ""
    if isinstance(error, ValueError | OSError):
        print(f"lgaf: {who}{error}", file=sys.stderr, flush=True)
        return
    text = "".join(traceback.format_exception(error))
    print(f"{text}lgaf: {who}{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End a process that has been through `join`: as Python does, but for the interpreter's teardown.

    Threads are waited for and exit functions called. What would follow is left out: the group outlives its
    destruction, as parameters of DeepSpeed and defaults of torch's functions hold it, and a thread of it that
    wants the interpreter's lock during the teardown aborts the process. So are the `finally`s of callers.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End the process now, when what was printed is out; or without it, as a stuck print holds its stream."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
    os._exit(code)


def _flush() -> None:
    # A closed or broken output must not change the exit code.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what C libraries have printed
