"""`lgaf submit`: put a training run into a Slurm queue through submitit.

What happens: submitit writes a batch script and a pickled call of `slurm.task.train` into the log folder and
hands the script to sbatch; the job's number and logs are printed. On the cluster every task makes that call,
in the folder the command was given in; all nodes must share it and the log folder.
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import submitit
from submitit.core.utils import FailedJobError
from typer import Argument, Exit, Option, echo

POLL_S = 5.0
# Before the time limit, as in the batch script.
SIGNAL_DELAY_S = 120

Config = Annotated[Path, Argument(help="configuration file, as for `lgaf train`")]
Nodes = Annotated[int, Option(help="number of nodes", min=1)]
TasksPerNode = Annotated[int, Option(help="ranks on each node", min=1)]
GpusPerNode = Annotated[int | None, Option(help="GPUs of each node; one per rank if not given", min=0)]
CpusPerTask = Annotated[int, Option(help="CPU cores of each rank", min=1)]
MemGb = Annotated[int | None, Option(help="memory of each node in GB; else the cluster's default", min=1)]
TimeMin = Annotated[int, Option(help="time limit in minutes", min=1)]
Partition = Annotated[str | None, Option(help="partition; else the cluster's default")]
Logs = Annotated[Path, Option(help="folder of the logs, with one folder per job in it")]
Wait = Annotated[bool, Option("--wait", help="return when the job has ended, with exit code 1 if it failed")]
Overrides = Annotated[list[str] | None, Option("--set", help="KEY=VALUE, over the configuration file's")]


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
    # Not at the head: it brings torch along, which `lgaf --help` does without.
    from trainer.config import load

    # A mistake in the configuration is found now, not when the job's turn has come.
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
        # srun does not take over sbatch's --cpus-per-task; a dead rank would leave the others waiting.
        "slurm_srun_args": [f"--cpus-per-task={cpus_per_task}", "--kill-on-bad-exit=0", "--wait=30"],
    }
    job = _submit(config.absolute(), overrides or [], logs, resources)
    paths = job.task(0).paths
    echo(f"job {job.job_id}; logs of rank 0, with those of the other ranks beside them:")
    echo(f"  {paths.stdout}\n  {paths.stderr}")
    if wait:
        _wait(job)


def _submit(config: Path, overrides: list[str], logs: Path, resources: dict[str, Any]) -> submitit.Job[None]:
    # As above.
    from slurm.task import train

    if not shutil.which("sbatch"):
        raise ValueError(
            "expected a machine that submits to Slurm, found no sbatch on the PATH; run this on a login node"
        )
    executor = submitit.AutoExecutor(folder=logs / "%j", cluster="slurm")
    given = {name: value for name, value in resources.items() if value is not None}
    executor.update_parameters(name="lgaf", slurm_additional_parameters={"requeue": True}, **given)
    try:
        return executor.submit(train, config, overrides)
    except FailedJobError as error:
        raise ValueError(f"expected sbatch to accept the job, found: {error}; asked for {given}") from error


def _wait(job: submitit.Job[None]) -> None:
    # Slurm's word, not submitit's result files: a rank that was killed leaves none.
    while not job.watcher.is_done(job.job_id, mode="force"):
        time.sleep(POLL_S)
    echo(f"job {job.job_id}: {job.state}")
    if job.state != "COMPLETED":
        raise Exit(1)
