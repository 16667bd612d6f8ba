"""The rooms import each other in one direction only, and each outside world has one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "data_pipeline": {"data_pipeline"},
    "partial_fc": {"partial_fc"},
    "trainer": {"trainer", "data_pipeline", "partial_fc"},
    "slurm": {"slurm", "trainer"},
}
DOORS = {
    "nvidia": {"data_pipeline/decode.py"},
    "deepspeed": {"trainer/engine.py"},
    "prometheus_client": {"trainer/monitoring/prometheus.py"},
    "submitit": {"slurm/submit.py"},
    "triton": {"partial_fc/kernels.py"},
}


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def imported(path):
    """Top-level names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    found = {name for path in sources(room) for name in imported(path) if name in {*ROOMS, "tests"}}
    assert found <= ROOMS[room]
    assert sources(room)


@pytest.mark.parametrize("package", DOORS)
def test_an_outside_world_has_one_door(package):
    found = {
        str(path.relative_to(ROOT)) for room in ROOMS for path in sources(room) if package in imported(path)
    }
    assert found == DOORS[package]


def test_the_backbones_know_nothing_of_ranks():
    text = "".join(path.read_text() for path in sources("trainer/backbones"))
    assert "distributed" not in text


def test_only_one_module_of_the_trainer_reads_rank_variables():
    readers = [
        path.name
        for room in ROOMS
        for path in sources(room)
        if any(name in path.read_text() for name in ('"RANK"', '"LOCAL_RANK"', '"SLURM_PROCID"'))
    ]
    assert readers == ["ranks.py"]
