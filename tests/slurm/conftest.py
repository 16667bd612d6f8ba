"""The cluster on which the tests of this folder run, started once for all of them."""

from collections.abc import Iterator

import pytest

from tests.cluster.loopback_slurm import LoopbackSlurm
from tests.conftest import require_root


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[LoopbackSlurm]:
    """A running Slurm of two nodes, 16 claimed CPUs each; ends with the session."""
    require_root("a Slurm on loopback")
    with LoopbackSlurm() as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # As torchrun sets it: the order of a floating-point sum depends on the number of threads.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
