"""`lgaf submit`: submit a training run to Slurm through submitit.

1. The configuration is loaded, so that an error in it is reported at once.
2. submitit writes a batch script and a pickled call of `slurm.task.train` into the log folder, and submits
   the script with sbatch. The job's number and the paths of its logs are printed.
3. On the cluster every task runs that call in the folder in which `lgaf submit` was run. All nodes must share
   this folder and the log folder.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import submitit
from submitit.core.utils import FailedJobError
from typer import Argument, Exit, Option, echo

POLL_S = 5.0
# Time between the signal and the time limit, as in train_webface42m.sh.
SIGNAL_DELAY_S = 120
# By this secret, which srun passes on, the ranks recognise each other. Each start of the job has a new one.
_SETUP = ["export LGAF_JOB_SECRET=$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')"]

Config = Annotated[Path, Argument(help="configuration file, as for `lgaf train`")]
Nodes = Annotated[int, Option(help="number of nodes", min=1)]
TasksPerNode = Annotated[int, Option(help="ranks on each node", min=1)]
GpusPerNode = Annotated[int | None, Option(help="GPUs of each node; one per rank if not given", min=0)]
CpusPerTask = Annotated[int, Option(help="CPU cores of each rank", min=1)]
MemGb = Annotated[int | None, Option(help="memory of each node in GB; by default the cluster's", min=1)]
TimeMin = Annotated[int, Option(help="time limit in minutes", min=1)]
Partition = Annotated[str | None, Option(help="partition; by default the cluster's")]
Logs = Annotated[Path, Option(help="folder of the logs; each job gets a folder in it")]
Wait = Annotated[bool, Option("--wait", help="return when the job has ended, with exit code 1 if it failed")]
Overrides = Annotated[
    list[str] | None, Option("--set", help="KEY=VALUE, instead of the configuration file's")
]


def submit(
    config: Config,
    nodes: Nodes,
    tasks_per_node: TasksPerNode,
    gpus_per_node: GpusPerNode = None,
    cpus_per_task: CpusPerTask = 1,
    mem_gb: MemGb = None,
    time_min: TimeMin = 24 * 60,
    partition: Partition = None,
    logs: Logs = Path("logs"),
    wait: Wait = False,
    overrides: Overrides = None,
) -> None:
    """Submit a training run to Slurm."""
    # Imported here because it imports torch, which `lgaf --help` does not need.
    from trainer.config import load

    # An error in the configuration is reported now, not when the job starts.
    load(config, overrides or [])
    resources = {
        "nodes": nodes,
        "tasks_per_node": tasks_per_node,
        "gpus_per_node": tasks_per_node if gpus_per_node is None else gpus_per_node,
        "cpus_per_task": cpus_per_task,
        "mem_gb": mem_gb,
        "timeout_min": time_min,
        "slurm_partition": partition,
        "slurm_signal_delay_s": min(SIGNAL_DELAY_S, 15 * time_min),
        "slurm_setup": _SETUP,
        # srun does not inherit sbatch's --cpus-per-task. --wait ends a job in which one rank has exited and
        # the others hang.
        "slurm_srun_args": [f"--cpus-per-task={cpus_per_task}", "--kill-on-bad-exit=0", "--wait=30"],
    }
    job = _submit(config.absolute(), overrides or [], logs, resources)
    paths = job.task(0).paths
    echo(f"job {job.job_id}; logs of rank 0 (those of the other ranks are in the same folder):")
    echo(f"  {paths.stdout}\n  {paths.stderr}")
    if wait:
        _wait(job)


def _submit(config: Path, overrides: list[str], logs: Path, resources: dict[str, Any]) -> submitit.Job[None]:
    # Imported here because it imports torch.
    from slurm.task import train

    if not shutil.which("sbatch"):
        raise ValueError(
            "expected sbatch on the PATH, found none; run this command on a login node of the cluster"
        )
    executor = submitit.AutoExecutor(folder=logs / "%j", cluster="slurm")
    given = {name: value for name, value in resources.items() if value is not None}
    executor.update_parameters(name="lgaf", slurm_additional_parameters={"requeue": True}, **given)
    logs.mkdir(parents=True, exist_ok=True)
    try:
        with _private_files() as mask:
            job = executor.submit(train, config, overrides)
    except FailedJobError as error:
        raise ValueError(
            f"expected sbatch to accept the job, found: {error}; requested {given}; change the request"
        ) from error
    job.paths.folder.chmod(0o777 & ~mask)
    return job


@contextlib.contextmanager
def _private_files() -> Iterator[int]:
    """Create files that only their owner can read; return the umask, which the job keeps.

    The pickled overrides may contain credentials, in the URLs of shards. sbatch gives the job the umask in
    SLURM_UMASK.
    """
    mask = os.umask(0o077)
    given = os.environ.get("SLURM_UMASK")
    os.environ["SLURM_UMASK"] = f"{mask:04o}"
    try:
        yield mask
    finally:
        os.umask(mask)
        del os.environ["SLURM_UMASK"]
        if given is not None:
            os.environ["SLURM_UMASK"] = given


def _wait(job: submitit.Job[None]) -> None:
    # The state comes from Slurm, not from submitit's result files: a killed rank writes none.
    while not job.watcher.is_done(job.job_id, mode="force"):
        time.sleep(POLL_S)
    echo(f"job {job.job_id}: {job.state}")
    if job.state != "COMPLETED":
        raise Exit(1)
