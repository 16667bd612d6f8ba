"""Placement of a process, read from the variables of its launcher."""

import pytest

from trainer.runtime.ranks import Placement, first_host, placement, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "3",
    "LGAF_JOB_SECRET": "any",
}


def test_torchrun():
    assert placement(TORCHRUN) == Placement(5, 8, 1, 4, "gpu1", 29501)


def test_torchrun_inside_a_slurm_step_wins():
    assert placement({**SRUN, **TORCHRUN}) == Placement(5, 8, 1, 4, "gpu1", 29501)


def test_srun():
    found = placement(SRUN)
    assert found == Placement(2, 3, 0, 1, "node1", found.master_port)
    assert 1024 < found.master_port < 32768


def test_jobs_of_one_node_meet_at_different_ports():
    ports = {
        placement({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(100)
        for step in range(3)
    }
    assert len(ports) > 290  # of 16,000, drawn by the secret


def test_srun_on_one_node_meets_on_loopback():
    alone = {"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_STEP_NODELIST": "node1"}
    assert placement({**SRUN, **alone}).master_address == "127.0.0.1"


def test_a_batch_script_without_srun_is_alone():
    batch = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NODEID": "0"}
    assert placement(batch) == Placement(0, 1, 0, 1, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-4]", "node1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("a[7,9]", "a7"),
        ("rack1-n[02-03]-ib", "rack1-n02-ib"),
    ],
)
def test_first_host(text, host):
    assert first_host(text) == host


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
    with pytest.raises(ValueError, match="expected a form such as"):
        tasks_per_node("four")
