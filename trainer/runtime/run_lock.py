"""The lock of a run directory, for which a single training may write: RUN_DIR/run.lock, a JSON object.

    create    write the holder's name to a private file, and link it to run.lock, which fails if that exists
    refuse    if the holder lives: its process exists, or it renewed the lock's time while this one watched
    take      else rename the private file to run.lock, and look again after a second
    renew     a thread sets the time of run.lock every few seconds, so that other nodes can see it
    release   remove run.lock; a killed run leaves it

It works without `flock`, which parallel file systems lack or keep to one node, and without equal clocks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_pipeline.common import bounded_json
from data_pipeline.common.terminal import echo
from trainer.checkpoint.checksummed_file import open_regular

LOCK_FILE = "run.lock"
_LONGEST = 4096
# Parallel file systems can stall for seconds, and NFS shows a new time some seconds later.
_RENEW_S, _SILENT_S = 5.0, 30.0
_SETTLE_S = 1.0


@dataclass(frozen=True)
class Holder:
    """The process that trains: `machine` is the boot and the process namespace, in which `process` is unique.

    process_start is in clock ticks since the boot, because the system uses process numbers again. job and
    restart are Slurm's, empty outside it; time_s is in seconds since 1970.
    """

    host: str
    machine: str
    process: int
    process_start: int
    job: str
    restart: str
    time_s: float
    token: str

    @classmethod
    def here(cls) -> Holder:
        """Return the description of this process."""
        process = os.getpid()
        return cls(
            socket.gethostname(),
            _machine(),
            process,
            _start_of(process) or 0,
            os.environ.get("SLURM_JOB_ID", ""),
            os.environ.get("SLURM_RESTART_COUNT", "0"),
            time.time(),
            secrets.token_hex(8),
        )

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time_s))
        return f"process {self.process} on {self.host}{job}, since {since}"


@contextlib.contextmanager
def held(run_dir: Path, *, renew_s: float = _RENEW_S, silent_s: float = _SILENT_S) -> Iterator[None]:
    """Hold the lock of a run directory, which is created if missing.

    The lock of a process that no longer runs is taken over: at once if it ran on this machine or was an
    earlier start of the same Slurm job; else when nobody has renewed it for `silent_s` seconds.

    Raises ValueError if another process holds it, or if the folder cannot be written.
    """
    me = Holder.here()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = _acquired(run_dir / LOCK_FILE, me, renew_s, silent_s)
    except OSError as error:
        raise ValueError(
            f"run_dir {run_dir}: expected a folder that can be written, found: {error.strerror}; set another"
        ) from error
    is_over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(handle, is_over, renew_s), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        is_over.set()
        renewing.join(_SETTLE_S)  # the file system may hang
        os.close(handle)
        with contextlib.suppress(OSError):
            if _read(run_dir / LOCK_FILE) == me:
                (run_dir / LOCK_FILE).unlink()


def _acquired(lock: Path, me: Holder, renew_s: float, silent_s: float) -> int:
    """Create or take over the lock, and return its descriptor."""
    mine = lock.with_name(f".{LOCK_FILE}.{me.token}")
    handle = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(handle, json.dumps(asdict(me)).encode() + b"\n")
        while not _is_linked(mine, lock):
            found = _refuse_if_alive(lock, os.fstat(handle).st_mtime, renew_s, silent_s)
            # Nobody else may have taken it over during the wait.
            if os.path.lexists(lock) and _read(lock) == found:
                os.replace(mine, lock)
                # Another process can have seen the same remains and have renamed its file a moment later.
                time.sleep(_SETTLE_S)
                if _read(lock) == me:
                    break
                raise _refusal(lock, _read(lock))
    except BaseException:
        os.close(handle)
        raise
    finally:
        mine.unlink(missing_ok=True)
    return handle


def _is_linked(mine: Path, lock: Path) -> bool:
    """Give the private file the name of the lock; return False if that exists."""
    try:
        os.link(mine, lock)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links: the file is empty for a moment, which counts as a living holder.
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        os.replace(mine, lock)
    return True


def _refuse_if_alive(lock: Path, now_s: float, renew_s: float, silent_s: float) -> Holder | None:
    """Raise ValueError if the holder of the lock lives; return the holder, None if the file names none.

    now_s: the time of a new file, by the clock of the file system.
    """
    found = _read(lock)
    if found is not None:
        if found.machine == _machine():
            if _start_of(found.process) == found.process_start:
                raise _refusal(lock, found)
            return found
        me = Holder.here()
        if found.job and found.job == me.job and found.restart != me.restart:
            return found
    first_s = _renewed_s(lock)
    if now_s - first_s > 2 * silent_s:
        return found
    echo(f"lgaf: {lock} is of {found or 'an unknown process'}; it is watched for {silent_s:g} s", err=True)
    for _ in range(round(silent_s / renew_s) + 1):
        time.sleep(renew_s)
        if not os.path.lexists(lock):
            return found
        if _renewed_s(lock) != first_s or _read(lock) != found:
            raise _refusal(lock, _read(lock) or found)
    return found


def _refusal(lock: Path, holder: Holder | None) -> ValueError:
    return ValueError(
        f"{lock}: expected no other training in this run directory, found one: {holder or 'unknown'}; wait "
        "until it ends, set another run_dir, or, if you know that it does not run, remove this file"
    )


def _renewed_s(lock: Path) -> float:
    """Return the time of the last renewal, 0 if the lock is gone; it is opened, because NFS caches times."""
    try:
        with open_regular(lock) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0


def _renew(handle: int, is_over: threading.Event, renew_s: float) -> None:
    # By the descriptor: the name may lead to the lock of a process that has taken over.
    while not is_over.wait(renew_s):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _read(lock: Path) -> Holder | None:
    """Return the holder that a lock file names, None if the file is gone, empty or damaged."""
    try:
        with open_regular(lock) as file:
            held = bounded_json.parse(file.read(_LONGEST))
        holder = Holder(**held)
    except (OSError, ValueError, TypeError):
        return None
    kinds = {"str": str, "int": int, "float": float}
    is_right = all(type(getattr(holder, field.name)) is kinds[str(field.type)] for field in fields(holder))
    is_shown = is_right and f"{holder.host}{holder.job}".isprintable() and 0 <= holder.time_s < 1e11
    return holder if is_shown else None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(process: int) -> int | None:
    """Return the start of a process, in clock ticks since the boot; None if it does not run."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        state, *values = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(values[18])
