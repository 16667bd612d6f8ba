"""Real gloo ranks against one rank on the concatenated batch: what sharding must not change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORLD = 3
TIMEOUT_S = 120
DEFAULTS = {"run": "twins", "rows": 12, "width": 8, "ignored": 0, "micro_batches": 1, "dtype": "float64"}
# Rounding of sums in another order, relative to the largest value; logits reach 64.
TOLERANCE = {"float64": 1e-11, "float32": 3e-5}

TWINS = {
    "even": {"world": 2, "classes": 8, "head": {"tile": 3}},
    "uneven": {"world": 2, "classes": 7, "head": {"tile": 2}},
    "uneven, three ranks": {"world": 3, "classes": 7, "head": {"tile": 1}},
    "a rank without classes": {"world": 3, "classes": 4, "head": {}},
    "two ranks without classes": {"world": 3, "classes": 1, "head": {}},
    "a rank without classes, dense": {"world": 3, "classes": 4, "head": {"backend": "dense"}},
    "cosface": {"world": 3, "classes": 50, "head": {"margin": {"kind": "cosface", "m": 0.4}, "tile": 16}},
    "ignored rows": {"world": 2, "classes": 9, "ignored": 7, "head": {"tile": 2}},
    "accumulated": {"world": 3, "classes": 10, "micro_batches": 3, "ignored": 1, "head": {"tile": 3}},
    "float32": {"world": 3, "classes": 2500, "width": 32, "dtype": "float32", "head": {"tile": 64}},
}
GATHERS = {f"gather {norms}": {"run": "gather", "world": WORLD, "norms": norms} for norms in (0, 1, 3)}
CHECKPOINT = {"run": "checkpoint", "world": WORLD, "classes": 10, "head": {}}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What every rank saw: a list over ranks of {case: results}."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {**TWINS, **GATHERS, "checkpoint": {**CHECKPOINT, "folder": str(folder / "checkpoint")}}
    (folder / "cases.json").write_text(
        json.dumps({name: {**DEFAULTS, **case} for name, case in cases.items()})
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    ranks = [
        subprocess.Popen([*command, str(rank), str(WORLD), str(folder)], env=environment)
        for rank in range(WORLD)
    ]
    try:
        assert [rank.wait(TIMEOUT_S) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error, largest = (found - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * largest, f"error {error:.1e} in numbers up to {largest:.1e}"


@pytest.mark.parametrize("name", TWINS)
def test_sharded_training_equals_one_rank_on_the_whole_batch(seen, name):
    case = {**DEFAULTS, **TWINS[name]}
    sharded = [results[name]["sharded"] for results in seen[: case["world"]]]
    alone = seen[0][name]["alone"]
    tolerance = TOLERANCE[case["dtype"]]
    for results in sharded:
        assert torch.equal(results["loss"], sharded[0]["loss"])
    assert_close(sharded[0]["loss"], alone["loss"], tolerance)
    assert_close(torch.cat([results["grad"] for results in sharded], dim=1), alone["grad"], tolerance)
    for state in ("weight", "momentum"):
        assert_close(torch.cat([results[state] for results in sharded]), alone[state], tolerance)


def test_the_cases_hold_ranks_without_classes(seen):
    rows = [len(results["two ranks without classes"]["sharded"]["weight"]) for results in seen]
    assert rows == [1, 0, 0]


@pytest.mark.parametrize("name", GATHERS)
def test_gather_brings_every_bit_in_the_order_of_the_ranks(seen, name):
    for part in range(3):
        sent = torch.cat([results[name]["sent"][part] for results in seen])
        for results in seen:
            received = results[name]["received"][part]
            assert received.dtype == sent.dtype
            assert received.shape == sent.shape
            assert received.contiguous().view(torch.uint8).equal(sent.view(torch.uint8))


def test_scatter_sums_over_ranks_and_leaves_each_its_rows(seen):
    name = next(iter(GATHERS))
    total_GD = sum(results[name]["partial"] for results in seen)
    assert_close(torch.cat([results[name]["scattered"] for results in seen]), total_GD, 1e-6)


@pytest.mark.parametrize("world", ["2", "1"])
def test_a_state_saved_on_three_ranks_goes_on_with_fewer(seen, world):
    first, other = [
        [results["checkpoint"][size] for results in seen if size in results["checkpoint"]]
        for size in (str(WORLD), world)
    ]
    assert len(other) == int(world)
    assert_close(other[0]["loss"], first[0]["loss"], TOLERANCE["float64"])
    for state in ("weight", "momentum"):
        expected, found = (torch.cat([results[state] for results in ranks]) for ranks in (first, other))
        assert_close(found, expected, TOLERANCE["float64"])
