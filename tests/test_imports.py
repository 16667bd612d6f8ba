"""The rooms import each other in one direction only, and each outside world has one door."""

import ast
import graphlib
import subprocess
import sys
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


def modules():
    """Name -> file of every module of the project."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for room in ROOMS
        for path in sources(room)
    }


def test_no_modules_import_each_other_in_a_circle():
    known, graph = modules(), {}
    for name, path in known.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        pairs = [(f"{node.module}.{alias.name}", node.module) for node in nodes for alias in node.names]
        graph[name] = {
            module for inner, outer in pairs if (module := inner if inner in known else outer) in known
        }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import data_pipeline.batch", {"nvidia", "deepspeed"}),
        ("import trainer.evaluation.suite, trainer.evaluation.compare", {"nvidia", "deepspeed"}),
        ("import trainer.__main__", {"nvidia", "deepspeed", "torch", "submitit", "prometheus_client"}),
    ],
)
def test_what_is_not_needed_is_not_imported(code, absent):
    """`lgaf --help` imports trainer.__main__ alone."""
    asked = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, text=True, capture_output=True, check=True)
    assert not absent & {*done.stdout.split()}
