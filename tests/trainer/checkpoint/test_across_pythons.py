"""Checkpoints across Pythons: each Python in LGAF_PYTHONS reads the checkpoints of all."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.conftest import ROOT
from trainer.checkpoint import directory

# Interpreters of environments in which the project's dependencies are installed, separated as in PATH.
PYTHONS = [sys.executable, *filter(None, os.environ.get("LGAF_PYTHONS", "").split(os.pathsep))]


def start(python: str, *words: object) -> None:
    """Run the script under one Python; its output is shown if it fails."""
    subprocess.run(
        [python, "-m", "tests.trainer.checkpoint.across_pythons", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A run directory with a checkpoint by each Python."""
    folders = {}
    for python in PYTHONS:
        folders[python] = tmp_path_factory.mktemp("by") / "run"
        start(python, "write", folders[python])
    return folders


@pytest.mark.parametrize(("writer", "reader"), [*itertools.product(PYTHONS, PYTHONS)])
def test_each_reads_what_each_has_written(written, writer, reader):
    start(reader, "read", written[writer])


def test_all_write_the_same_bytes(written):
    checkpoints = [folder / "checkpoints" / "step-00000004" for folder in written.values()]
    for name in ("rank-0.bin", "rank-1.bin"):
        contents = [(checkpoint / name).read_bytes() for checkpoint in checkpoints]
        assert len(contents[0]) > 20
        assert set(contents) == {contents[0]}
    manifests = [directory.read_manifest(checkpoint) for checkpoint in checkpoints]
    assert all((m.files, m.tensors) == (manifests[0].files, manifests[0].tensors) for m in manifests)
