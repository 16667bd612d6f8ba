"""A real Slurm with several "nodes" on one machine, for the tests.

1. Entering `LoopbackSlurm` installs Debian's Slurm and MUNGE packages where they are missing.
2. It writes a configuration into a folder of its own and starts, without systemd, one munged, one slurmctld
   and a slurmd per node, all on 127.0.0.1. Each slurmd lives in namespaces of its own (host name, processes,
   mounts), so that a node has its own name, sees only its own processes, and takes them along when it ends.
   The node names resolve on the nodes only: the machine's /etc/hosts is left alone.
3. Leaving the context ends jobs, nodes and daemons and removes the folder. Should the process that started
   the cluster be killed, the kernel ends them with it.

Nothing else on the machine is touched: sockets, keys, logs and state are in the folder, ports are free ones.
It needs root on a Debian system, since nodes are made of namespaces.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "setpriv")
SACCT_FOLDER = Path(__file__).with_name("bin")
CPUS_PER_NODE = 16  # claimed, not bound to real ones: jobs of any usual size fit
MEMORY_PER_NODE_MB = 16_000  # claimed too, and not enforced
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0  # for each daemon, after which it is killed
POLL_S = 0.1
UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}

# MinJobAge keeps ended jobs visible; cred_expire is how long a requeued job waits; the plugins are those that
# need neither cgroups nor PMIx.
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
MailProg=/bin/true
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
MinJobAge=3600
ReturnToService=2
NodeName=DEFAULT CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP
"""

# The shell is process 1 of the node: it reaps orphans, and its end is the end of all that runs there.
NODE_SCRIPT = """
hostname {node}
mount --bind {folder}/hosts /etc/hosts
slurmd -D -N {node} &
wait $!
"""


class ClusterError(RuntimeError):
    """The cluster could not be installed, started or reached; the message says why and what to do."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Slurm's word for it, such as COMPLETED or FAILED, and the batch script's exit code."""

    state: str
    exit_code: int


def install() -> None:
    """Install Slurm and MUNGE from Debian's packages unless they are there.

    Raises ClusterError without root, without apt-get, or with apt-get's own words where it fails.
    """
    if os.geteuid() != 0:
        raise ClusterError(
            "a Slurm on loopback makes its nodes from namespaces: expected user 0 (root), found user "
            f"{os.geteuid()}; run as root in a container, or leave out tests/slurm and tests/cluster"
        )
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_search_path())]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ClusterError(
            f"expected a Debian system or the programs {', '.join(PROGRAMS)}, found neither apt-get nor "
            f"{', '.join(missing)}; install Slurm and MUNGE by hand"
        )
    apt = ("apt-get", "-o", "DPkg::Lock::Timeout=300")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(*apt, "update", env=environment)
    _run(*apt, "install", "--yes", "--no-install-recommends", *PACKAGES, env=environment)


class LoopbackSlurm:
    """A Slurm cluster that lives as long as the `with` block; see the head of this file.

    `nodes` are called node1, node2, ... and claim 16 CPUs and 16 GB each, whatever the machine has.
    """

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        # Not below pytest's folders: the path of a unix socket must stay under 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="loopback-slurm-", dir="/tmp"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        """The environment in which sbatch, srun, squeue, scontrol and sacct talk to this cluster."""
        outer = {
            name: value for name, value in os.environ.items() if not re.match("S(LURM|BATCH|RUN)_", name)
        }
        path = f"{SACCT_FOLDER}{os.pathsep}{_search_path()}"
        return {**outer, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            install()
            self._write_configuration()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def submit(self, *arguments: str | Path, cwd: Path) -> int:
        """Run `sbatch ARGUMENTS` in the folder `cwd`; returns the job's number."""
        printed = _run("sbatch", "--parsable", *map(str, arguments), env=self.env, cwd=cwd)
        return int(printed.split(";")[0])

    def wait(self, job: int, timeout_s: float) -> JobEnd:
        """Wait until a job has ended, for at most `timeout_s` seconds, after which ClusterError is raised."""
        deadline = time.monotonic() + timeout_s
        while True:
            record = self.command("scontrol", "--oneliner", "show", "job", str(job))
            fields = dict(word.split("=", 1) for word in record.split() if "=" in word)
            if fields["JobState"] not in UNFINISHED:
                return JobEnd(fields["JobState"], int(fields["ExitCode"].split(":")[0]))
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"expected job {job} to end within {timeout_s} s, found:\n{record}\n{self.logs()}"
                )
            time.sleep(POLL_S)

    def command(self, *words: str) -> str:
        """What a command prints that is run against this cluster; ClusterError where it fails."""
        return _run(*words, env=self.env)

    def logs(self) -> str:
        """The last lines of every daemon's log, to go with a failure."""
        tails = []
        for path in sorted((self.folder / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()
            tails.append("\n".join([f"--- {path.name}", *lines[-20:]]))
        return "\n".join(tails)

    def stop(self) -> None:
        """End every process of the cluster, jobs included, last started first, and remove the folder."""
        while self._daemons:
            daemon = self._daemons.pop()
            if daemon.poll() is None:
                os.killpg(daemon.pid, signal.SIGTERM)
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        shutil.rmtree(self.folder)

    def _write_configuration(self) -> None:
        for name in ("log", "state", "spool"):
            (self.folder / name).mkdir()
        controller_port, *node_ports = _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            for node, port in zip(self.nodes, node_ports, strict=True)
        ]
        configuration = CONFIGURATION.format(
            folder=self.folder,
            controller_port=controller_port,
            cpus=CPUS_PER_NODE,
            memory_mb=MEMORY_PER_NODE_MB,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(configuration)
        # slurmd 22.05 looks for a cgroup mount although no plugin here uses one; version 1 does not insist.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = " ".join(["localhost", *self.nodes])
        (self.folder / "hosts").write_text(f"127.0.0.1 {names}\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        files |= {"log-file": "log/munged.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        # --force: the folder lies below one that anybody may write to.
        self._launch("munged", "munged", "--foreground", "--force", *options)
        munge_socket = self.folder / "munge.sock"
        self._until(munge_socket.exists, "munged's socket")
        self._launch("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            script = NODE_SCRIPT.format(node=node, folder=self.folder)
            namespaces = ("--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child")
            self._launch(node, "unshare", *namespaces, "bash", "-euc", script)
        self._until(self._all_idle, f"{len(self.nodes)} idle nodes in sinfo")

    def _launch(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground of a session of its own, to die with this process."""
        with open(self.folder / "log" / f"{name}.out", "wb") as output:
            daemon = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *command),
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _all_idle(self) -> bool:
        command = ("sinfo", "--noheader", "--Node", "--format=%T")
        printed = subprocess.run(command, env=self.env, capture_output=True, text=True).stdout
        return printed.split() == ["idle"] * len(self.nodes)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise ClusterError(
                    f"expected {what} within {START_TIMEOUT_S} s, found none; daemons that ended: {ended}\n"
                    f"{self.logs()}"
                )
            time.sleep(POLL_S)


def _search_path() -> str:
    # Debian's daemons are in /usr/sbin, which an ordinary PATH may lack.
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens; held together, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def _run(*command: str, env: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, env=env, cwd=cwd, text=True, capture_output=True)
    if done.returncode != 0:
        raise ClusterError(
            f"expected `{' '.join(command)}` to succeed, found exit code {done.returncode}:\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout
