"""Real gloo ranks against one rank on the concatenated batch: sharding must not change the results."""

import pytest
import torch

from tests.partial_fc import ranks
from tests.ranks import run_ranks

WORLD = 4
DEFAULTS = {
    "run": "twins",
    "world": 2,
    "classes": 50,
    "rows": 12,
    "width": 8,
    "ignored": 0,
    "micro_batches": 1,
    "dtype": "float64",
    "learning_rate": 0.1,
    "head": {},
}
# Rounding of sums in another order, relative to the largest value; logits reach 64.
TOLERANCE = {"float64": 1e-10, "float32": 3e-5}

ADAFACE, MAGFACE = {"kind": "adaface", "m": 0.4}, {"kind": "magface", "norm_low": 2.0}
TWINS = {
    "even": {"classes": 8, "head": {"tile": 3}},
    "uneven": {"classes": 7, "head": {"tile": 2}},
    "uneven, three ranks": {"world": 3, "classes": 7, "head": {"tile": 1}},
    "uneven, four ranks": {"world": 4, "classes": 53, "head": {"tile": 5}},
    "a rank without classes": {"world": 3, "classes": 4},
    "three ranks without classes": {"world": 4, "classes": 1},
    "a rank without classes, dense": {"world": 3, "classes": 4, "head": {"backend": "dense"}},
    "cosface": {"world": 3, "head": {"margin": {"kind": "cosface", "m": 0.4}, "tile": 16}},
    "combined": {"world": 3, "head": {"margin": {"kind": "combined"}}},
    "straight through": {"world": 3, "head": {"margin": {"kind": "arcface-straight-through"}}},
    "adaface": {"world": 4, "micro_batches": 3, "head": {"margin": ADAFACE}},
    "adaface, sampled": {"world": 3, "micro_batches": 2, "head": {"margin": ADAFACE, "sample_rate": 0.3}},
    "magface": {"world": 4, "micro_batches": 3, "head": {"margin": MAGFACE}},
    "curricularface": {"world": 4, "micro_batches": 3, "head": {"margin": {"kind": "curricularface"}}},
    "curricularface, dense": {
        "world": 4,
        "classes": 3,
        "head": {"margin": {"kind": "curricularface"}, "backend": "dense"},
    },
    "filtered": {"world": 3, "head": {"interclass_filter": 0.2, "tile": 7}},
    "ignored rows": {"classes": 9, "ignored": 7, "head": {"tile": 2}},
    "accumulated": {"world": 3, "classes": 10, "micro_batches": 4, "head": {"tile": 3}},
    "accumulated, ignored rows": {"world": 3, "micro_batches": 2, "ignored": 1, "head": {"tile": 3}},
    "sampled": {"world": 4, "classes": 100, "head": {"sample_rate": 0.3, "tile": 8}},
    "sampled, accumulated": {"world": 3, "classes": 100, "micro_batches": 4, "head": {"sample_rate": 0.3}},
    "sampled, few": {"world": 4, "classes": 100, "micro_batches": 3, "head": {"sample_rate": 0.01}},
    "sampled, dense": {"world": 2, "micro_batches": 3, "head": {"sample_rate": 0.3, "backend": "dense"}},
    "more positives than the rate": {"world": 3, "classes": 12, "rows": 48, "head": {"sample_rate": 0.01}},
    "adamw": {
        "world": 3,
        "classes": 100,
        "micro_batches": 2,
        "head": {"optimizer": {"kind": "adamw"}, "sample_rate": 0.3},
    },
    "float32": {
        "world": 3,
        "classes": 2500,
        "width": 32,
        "dtype": "float32",
        "head": {"tile": 64, "sample_rate": 0.1},
    },
}
GATHERS = {f"gather {norms}": {"run": "gather", "world": WORLD, "norms": norms} for norms in (0, 1, 3)}
CHECKPOINTS = {
    "sgd": {"classes": 10},
    "adamw, adaface": {"head": {"optimizer": {"kind": "adamw"}, "margin": ADAFACE, "sample_rate": 0.3}},
    "bf16, curricularface": {
        "head": {"optimizer": {"moments": "bf16"}, "margin": {"kind": "curricularface"}}
    },
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return the results of every rank: a list over ranks of {case: results}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = {
        name: {**case, "run": "checkpoint", "world": WORLD, "folder": str(folder / str(number))}
        for number, (name, case) in enumerate(CHECKPOINTS.items())
    }
    cases = {**TWINS, **GATHERS, **checkpoints}
    return run_ranks(ranks.run_cases, WORLD, {name: {**DEFAULTS, **case} for name, case in cases.items()})


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error, largest = (found - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * largest, f"error {error:.1e} in numbers up to {largest:.1e}"


def assert_same_state(ranks, expected, tolerance):
    """The rows of all ranks together, and every rank's statistics, are the expected ones."""
    for name, rows in expected["rows"].items():
        assert_close(torch.cat([results["rows"][name] for results in ranks]), rows, tolerance)
    for results in ranks:
        assert results["statistics"].keys() == expected["statistics"].keys()
        for name, value in expected["statistics"].items():
            assert_close(results["statistics"][name], value, tolerance)


@pytest.mark.parametrize("name", TWINS)
def test_sharded_training_equals_one_rank_on_the_whole_batch(seen, name):
    case = {**DEFAULTS, **TWINS[name]}
    sharded = [results[name]["sharded"] for results in seen[: case["world"]]]
    alone, start_RD = seen[0][name]["alone"], seen[0][name]["start"]
    tolerance = TOLERANCE[case["dtype"]]
    for results in sharded:
        assert torch.equal(results["loss"], sharded[0]["loss"])
    assert_close(sharded[0]["loss"], alone["loss"], tolerance)
    # [steps x micro-batches, rows of a rank] of each rank -> [steps, rows of the whole batch]
    grad_ABD = torch.cat([results["grad"] for results in sharded], dim=1)
    assert_close(grad_ABD.reshape(3, case["rows"], -1), alone["grad"].reshape(3, case["rows"], -1), tolerance)
    assert_same_state(sharded, alone, tolerance)
    assert not torch.equal(alone["rows"]["weight"], start_RD)


def test_the_cases_hold_ranks_without_classes(seen):
    rows = [len(results["three ranks without classes"]["sharded"]["rows"]["weight"]) for results in seen]
    assert rows == [1, 0, 0, 0]


def test_statistics_of_the_margins_have_moved(seen):
    for name in ("adaface", "curricularface"):
        assert all(value not in (0, 20, 100) for value in seen[0][name]["alone"]["statistics"].values())
        assert seen[0][name]["alone"]["statistics"]


def test_sampling_leaves_rows_where_they_are(seen):
    moved_R = (seen[0]["sampled, few"]["alone"]["rows"]["weight"] != seen[0]["sampled, few"]["start"]).any(1)
    assert 0 < moved_R.sum() < 45


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
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_state_saved_on_four_ranks_goes_on_with_fewer(seen, name, world):
    first, other = [
        [results[name][size] for results in seen if size in results[name]] for size in (str(WORLD), world)
    ]
    assert len(other) == int(world)
    # Moments of bfloat16 may round to either side.
    tolerance = 1e-2 if "bf16" in name else TOLERANCE["float64"]
    assert_close(other[0]["loss"], first[0]["loss"], TOLERANCE["float64"])
    whole = {
        "rows": {key: torch.cat([results["rows"][key] for results in first]) for key in first[0]["rows"]},
        "statistics": first[0]["statistics"],
    }
    assert_same_state(other, whole, tolerance)
