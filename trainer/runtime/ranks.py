"""This process among the ranks: the only reader of rank variables, and the reporter of a failed rank.

    with join() as ranks:      under torchrun, under Slurm's srun, or as a single process
        ...                    ranks.rank, ranks.group, ranks.device

A rank that fails prints its error and exits at once. Its closed connections interrupt the collectives of the
other ranks, which exit without an error message; torchrun or srun ends the remaining ones. If a rank was
killed or hangs, another rank reports it: `watchdog` determines which rank it is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from data_pipeline.common.terminal import echo
from trainer.runtime.watchdog import HangError, Pulse

# The same text on all ranks of a job and unknown to other users; the batch scripts of slurm/ create it.
SECRET = "LGAF_JOB_SECRET"
# Ports below Linux's range of ephemeral ports (32768 and up).
_FIRST_PORT, _PORTS = 15_000, 16_000
_JOIN_TIMEOUT = timedelta(minutes=10)
_FLUSH_S = 5.0
_CLOSED = r"onnection (closed|reset)|Broken pipe"


@dataclass(frozen=True)
class Placement:
    """The placement of one process: its ranks in the run and on its node, and the address of rank 0."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int


@dataclass(frozen=True)
class Ranks:
    """The ranks of this run, which form `group`; a single process is a group of one."""

    placement: Placement
    group: dist.ProcessGroup
    device: torch.device
    pulse: Pulse

    @property
    def rank(self) -> int:
        """The rank of this process, from 0."""
        return self.placement.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.placement.world_size

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes files and prints messages for the whole run."""
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
    """Return the placement from torchrun's variables, else srun's, else that of a single process.

    In a Slurm batch script without srun (SLURM_JOB_ID is set, SLURM_STEP_ID is not) it is a single process.
    Under srun the port follows from the job's secret, so that other users cannot predict it.

    Raises ValueError if srun started several ranks without a secret.
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
        world_size = int(env["SLURM_STEP_NUM_TASKS"])
        tasks_by_node = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        if world_size > 1 and not env.get(SECRET):
            raise ValueError(
                f"expected the environment variable {SECRET}, by which the ranks recognise each other, found "
                f"none; before srun, run: export {SECRET}=$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')"
            )
        return Placement(
            int(env["SLURM_PROCID"]),
            world_size,
            int(env["SLURM_LOCALID"]),
            tasks_by_node[int(env["SLURM_NODEID"])],
            first_host(env["SLURM_STEP_NODELIST"]) if len(tasks_by_node) > 1 else "127.0.0.1",
            _port(env),
        )
    return Placement(0, 1, 0, 1, "127.0.0.1", 0)


def _port(env: Mapping[str, str]) -> int:
    # A requeued job gets another port: the first one may have been in use.
    step = "/".join(env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    digest = hmac.digest(env.get(SECRET, "").encode(), f"port/{step}".encode(), "sha256")
    return _FIRST_PORT + int.from_bytes(digest[:8]) % _PORTS


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: `gpu003` for `gpu[003-005,9],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, expected names such as 'node[01-04]'")
    return "".join(part or "" for part in match.groups())


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks of every node from Slurm's short form: [2, 2, 2, 1] for `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, expected a form such as '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Join the process group of all ranks, and destroy it at the end of the block.

    An exception inside the block ends the process with exit code 1; the first rank that fails prints it.
    """
    try:
        where = placement(os.environ)
    except ValueError as error:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            echo(f"lgaf: {error}", err=True)
        _end(1)
    if _is_on_one_node(where):
        # By default gloo listens on the address of the host's name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = _store(where)
    except (dist.DistError, OSError) as error:
        _show(
            ValueError(
                f"the ranks could not connect at {where.master_address}:{where.master_port}: {error}; check "
                "that rank 0 is running, that its name resolves on every node, and that the port is free"
            ),
            where,
        )
        _end(1)
    with _speak_once(where, store) as pulse:
        device = _device(where)
        # DeepSpeed requires this variable, which only torchrun sets.
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
        _require_known_ranks(where, group)
        yield Ranks(where, group, device, pulse)
        # Rank 0 can host the store, so that no rank may exit while another still needs it.
        dist.barrier()
        dist.destroy_process_group()


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the values of all ranks of `group`, on all ranks; JSON, unlike a pickle, runs no code."""
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
    """Return the value of rank 0 of `group`, which JSON must be able to represent, on all ranks."""
    return gather_json(value if group.rank() == 0 else None, group)[0]


def _is_on_one_node(where: Placement) -> bool:
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == str(where.world_size)
    return is_alone or where.master_address == "127.0.0.1"


def _require_known_ranks(where: Placement, group: dist.ProcessGroup) -> None:
    """Raise ValueError if a process of the group does not know the job's secret.

    Every rank sends a random number, and then the HMAC of all of them and of its rank. torch's store accepts
    connections from any process, so that another user's process could have taken the place of a rank.
    """
    key = os.environ.get(SECRET, "").encode()
    numbers = b"".join(_gather_32_bytes(secrets.token_bytes(32), group))

    def proof(rank: int) -> bytes:
        return hmac.digest(key, b"rank %d of %d/" % (rank, where.world_size) + numbers, hashlib.sha256)

    found = _gather_32_bytes(proof(where.rank), group)
    unknown = [rank for rank, one in enumerate(found) if not hmac.compare_digest(one, proof(rank))]
    if unknown:
        raise ValueError(
            f"expected the same {SECRET} in the environment of all ranks, found another one on rank(s) "
            f"{', '.join(map(str, unknown))}: a process of another job or user may have joined; start again"
        )


def _gather_32_bytes(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    found = [torch.empty(32, dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(found, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=group)
    return [one.numpy().tobytes() for one in found]


def _store(where: Placement) -> dist.Store:
    if where.world_size == 1:
        return dist.HashStore()
    # torchrun hosts the store in its agent, where it survives a restart of the ranks.
    is_master = where.rank == 0 and not _has_agent_store()
    store = dist.TCPStore(
        where.master_address,
        where.master_port,
        where.world_size,
        is_master=is_master,
        timeout=_JOIN_TIMEOUT,
        wait_for_workers=False,
        # Without a socket, torch would listen on all interfaces.
        master_listen_fd=_listening(where).detach() if is_master else None,
    )
    # The agent's store is shared by all attempts, which must not see each other's keys.
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listening(where: Placement) -> socket.socket:
    """Return a socket that listens on the address by which the other ranks know this host."""
    family, _, _, _, (host, *_) = socket.getaddrinfo(
        where.master_address, where.master_port, type=socket.SOCK_STREAM
    )[0]
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo").split(",")[0]
    # Some hosts resolve their own name to a loopback address. Several nodes then need gloo's variable anyway.
    if ipaddress.ip_address(host).is_loopback and interface != "lo":
        family, host = socket.AF_INET, _address_of(interface)
    return socket.create_server((host, where.master_port), family=family, backlog=1024)


def _address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface of this host. Raises OSError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
    return socket.inet_ntoa(answer[20:24])


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
        once.acquire()  # never released: the second caller, main thread or watchdog, waits for the exit
        _speak(error, where, pulse)
        # A regular exit would wait for collectives that the other ranks have left.
        _end(1)

    keeper = "torchrun" if _has_agent_store() else "rank 0"
    pulse = Pulse(store, where.rank, where.world_size, keeper=keeper, end=end)
    try:
        with pulse:
            yield pulse
    except Exception as error:
        end(error)


def _speak(error: Exception, where: Placement, pulse: Pulse) -> None:
    """Print the error, or the rank that caused it, unless another rank is the one to report."""
    # The connections of a killed rank are closed.
    is_cut_off = isinstance(error, RuntimeError) and re.search(_CLOSED, str(error)) is not None
    verdict = pulse.verdict(is_other_at_fault=is_cut_off or isinstance(error, HangError))
    if not verdict.is_speaker:
        return
    if isinstance(error, HangError):
        error = ValueError(f"{error}; {verdict.culprit}")
    elif verdict.culprit:
        error = ValueError(
            f"another rank exited without reporting an error (killed, or out of memory?): {verdict.culprit}"
        )
    _show(error, where)


def _show(error: Exception, where: Placement) -> None:
    """Print an error; with its traceback unless it is an error of the user's input or of the system."""
    who = f"rank {where.rank}: " if where.world_size > 1 else ""
    if isinstance(error, ValueError | OSError):
        echo(f"lgaf: {who}{error}", err=True)
        return
    text = "".join(traceback.format_exception(error))
    echo(f"{text}lgaf: {who}{type(error).__name__}: {error}", err=True)


def leave(code: int) -> NoReturn:
    """End a process that has been through `join`, as Python does, but without the interpreter's teardown.

    It waits for threads and calls exit functions. It skips the teardown and the callers' `finally` blocks:
    DeepSpeed's parameters and defaults of torch's functions keep the process group alive after its
    destruction, and a thread of it that acquires the interpreter's lock during teardown aborts the process.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """Flush all output and end the process; end it without flushing if that hangs on a blocked stream."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
    os._exit(code)


def _flush() -> None:
    # A closed or broken output must not change the exit code.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # the output of C libraries
