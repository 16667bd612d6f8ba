"""The cluster on which the tests of this folder run, started once for all of them."""

from collections.abc import Iterator

import pytest

from tests.cluster.loopback_slurm import LoopbackSlurm


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[LoopbackSlurm]:
    """A running Slurm of two nodes, 16 claimed CPUs each; ends with the session."""
    with LoopbackSlurm() as cluster:
        yield cluster
