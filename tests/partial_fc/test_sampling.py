"""The classes of a step: a function of (seed, step, class) alone, at the rate asked for, positives in."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.partition import class_range
from partial_fc.sampling import draw, is_drawn

CPU = torch.device("cpu")


def ids(rate, seed, step, classes, labels=()):
    sample = draw(rate, seed, step, classes, torch.tensor(list(labels), dtype=torch.int64))
    return (torch.arange(len(classes))[sample.rows] + classes.start).tolist()


def splitmix64(state):
    """The published algorithm, in unbounded integers."""
    mask = 2**64 - 1
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return state ^ state >> 31


def test_the_hash_is_splitmix64():
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    # The first outputs of the published generator seeded with 1234567.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64((1234567 + n * golden) & mask) for n in (1, 2, 3)] == known
    key = splitmix64((splitmix64((5 + golden) & mask) + 9) & mask)
    expected = [splitmix64((key + n * golden) & mask) / 2**64 < 0.25 for n in range(1000, 1500)]
    assert is_drawn(0.25, 5, 9, range(1000, 1500), CPU).tolist() == expected


@given(
    rate=st.sampled_from([0.01, 0.3, 0.99]),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 2**40),
    classes=st.integers(1, 300),
    world=st.integers(1, 9),
    labels=st.lists(st.integers(-1, 299), max_size=20),
)
def test_any_number_of_ranks_draws_the_same_classes(rate, seed, step, classes, world, labels):
    labels = [label for label in labels if label < classes]
    whole = ids(rate, seed, step, range(classes), labels)
    parts = [ids(rate, seed, step, class_range(classes, rank, world), labels) for rank in range(world)]
    assert [number for part in parts for number in part] == whole
    assert whole == sorted(set(whole))
    assert set(labels) - {-1} <= set(whole)


def test_the_rate_is_kept_in_every_stretch_and_steps_and_seeds_differ():
    """Within five standard deviations of a binomial draw; two draws agree as often as chance has it."""
    drawn = torch.stack([is_drawn(0.3, seed, step, range(200_000), CPU) for seed, step in SEEDS])
    stretches = drawn.view(len(SEEDS), 20, 10_000).double().mean(2)
    assert ((stretches - 0.3).abs() < 5 * (0.3 * 0.7 / 10_000) ** 0.5).all()
    both = (drawn.double() @ drawn.double().T / 200_000).fill_diagonal_(0.09)
    assert ((both - 0.09).abs() < 5 * (0.09 * 0.91 / 200_000) ** 0.5).all()


SEEDS = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2**32), (2**32, 0)]


def test_a_rate_of_one_takes_all_rows_as_a_view():
    sample = draw(1.0, 0, 0, range(5, 12), torch.tensor([6]))
    assert sample.rows == slice(0, 7)
    assert [rows for _, rows in sample.tiles(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_positions_lead_back_to_rows():
    label_N = torch.tensor([3, 99, 40])
    sample = draw(0.2, 1, 2, range(100), label_N)
    position_N = sample.position_of(torch.tensor([3, -1, 99, 40]))
    assert position_N[1] == -1
    assert sample.row_at(position_N[[0, 2, 3]]).tolist() == [3, 99, 40]


def test_a_shard_from_which_nothing_is_drawn_is_empty():
    assert len(draw(1e-9, 0, 0, range(100), torch.tensor([100, -1]))) == 0
