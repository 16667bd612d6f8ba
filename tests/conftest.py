"""Shared by all tests: what to do where a right is missing, and the environment of the MXNet oracle.

That environment is built on first use and then kept.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

# No example may fail because the machine is busy.
settings.register_profile("lgaf", deadline=None)
settings.load_profile("lgaf")

ENVIRONMENT = Path(__file__).parents[1] / ".venv-mxnet"
REQUIREMENTS = Path(__file__).with_name("mxnet-requirements.txt")


def skip_without_right(reason: str) -> NoReturn:
    """Skip a test that needs rights that this user has not; fail it where all must run (LGAF_TEST_ALL)."""
    if os.environ.get("LGAF_TEST_ALL"):
        pytest.fail(f"LGAF_TEST_ALL is set, so that nothing may be skipped, but {reason}", pytrace=False)
    pytest.skip(reason)


def require_root(what: str) -> None:
    """Skip a test, or fail it, unless it runs as root."""
    if os.geteuid() != 0:
        skip_without_right(f"{what} needs root, found user {os.geteuid()}")


@pytest.fixture(scope="session")
def mxnet_python() -> Path:
    """The interpreter of an environment in which `import mxnet` works."""
    python, marker = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "complete"
    wanted = REQUIREMENTS.read_text()
    ENVIRONMENT.mkdir(exist_ok=True)
    with open(ENVIRONMENT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists() or marker.read_text() != wanted:
            marker.unlink(missing_ok=True)
            _run(_base_python(), "-m", "venv", ENVIRONMENT)
            _run(python, "-m", "pip", "install", "--disable-pip-version-check", "-r", REQUIREMENTS)
            _run(python, "-c", "import mxnet")
            marker.write_text(wanted)
    return python


def _base_python() -> str:
    # Python 3.11 is the last for which numpy below 1.24 has been built.
    return sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"


def _run(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.fail(
            f"the environment of the MXNet oracle could not be built in {ENVIRONMENT}: expected "
            f"`{' '.join(map(str, command))}` to succeed with Python 3.11, found: {error}\n"
            f"{getattr(error, 'output', '')}\nDelete {ENVIRONMENT} to start afresh.",
            pytrace=False,
        )
