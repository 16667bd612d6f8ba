"""The sample sequence: exact coverage, independence of its division into steps, and the random generator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import philox, shuffle


@pytest.mark.parametrize(
    ("counter_words", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter_words, key, expected):
    out = philox.philox(np.array(counter_words, np.uint64)[:, None], key)
    assert " ".join(f"{word:08x}" for word in out[:, 0]) == expected


def test_uniform_is_uniform():
    values = philox.uniform(3, np.arange(100_000), 7)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(axis=1) - 0.5).max() < 0.005
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 0.02


SHUFFLES = st.none() | st.builds(shuffle.Blocks, size=st.integers(1, 50), window=st.integers(1, 9))


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), records=st.integers(1, 700), epoch=st.integers(0, 2**31), blocks=SHUFFLES)
def test_every_epoch_visits_every_record_once(seed, records, epoch, blocks):
    ids = shuffle.record_of(seed, np.arange(epoch * records, (epoch + 1) * records), records, blocks)
    assert sorted(ids) == list(range(records))


@settings(deadline=None)
@given(
    records=st.integers(1, 10**4) | st.integers(1, 10**9),
    start=st.integers(0, 10**5) | st.integers(0, 10**15),
    cut=st.integers(0, 50),
    blocks=SHUFFLES,
)
def test_any_part_of_the_sequence_is_found_without_the_rest(records, start, cut, blocks):
    whole = shuffle.record_of(1, np.arange(start, start + 50), records, blocks)
    parts = [shuffle.record_of(1, np.arange(start, start + cut), records, blocks)]
    parts.append(shuffle.record_of(1, np.arange(start + cut, start + 50), records, blocks))
    assert np.array_equal(whole, np.concatenate(parts))


def test_a_window_is_read_in_as_many_runs_as_it_has_blocks():
    n, blocks = 10_007, shuffle.Blocks(size=100, window=8)
    ids = shuffle.record_of(3, np.arange(n), n, blocks)
    for start in range(0, 9600, 800):
        breaks = np.diff(np.sort(ids[start : start + 800])) != 1
        assert breaks.sum() <= 8  # 8 blocks, one of which the end of the dataset may split
    inside = ids[:800]
    assert abs(np.corrcoef(inside, np.arange(800))[0, 1]) < 0.2
    firsts = [shuffle.record_of(3, np.arange(e * n, e * n + 800), n, blocks) for e in range(3)]
    assert len({tuple(np.sort(first)) for first in firsts}) == 3


def test_blocks_of_one_record_are_a_full_shuffle():
    n = 5000
    ids = shuffle.record_of(0, np.arange(n), n, shuffle.Blocks(1, 1))
    assert abs(np.corrcoef(ids, np.arange(n))[0, 1]) < 0.05
    assert (np.abs(np.diff(ids)) == 1).mean() < 0.01


def test_epochs_and_seeds_differ_and_are_shuffled():
    n = 1000
    first, second = (shuffle.record_of(0, np.arange(e * n, (e + 1) * n), n) for e in (0, 1))
    other = shuffle.record_of(1, np.arange(n), n)
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert (a == b).mean() < 0.02
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_an_empty_dataset_and_a_negative_position_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        shuffle.record_of(0, np.arange(3), 0)
    with pytest.raises(ValueError, match="start at 0"):
        shuffle.record_of(0, np.array([-1]), 5)
