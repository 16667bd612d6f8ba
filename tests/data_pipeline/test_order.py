"""The sample sequence: exact coverage, independence of how it is cut, and the generator under it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import counter, order


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
    out = counter.philox(np.array(counter_words, np.uint64)[:, None], key)
    assert " ".join(f"{word:08x}" for word in out[:, 0]) == expected


def test_uniform_is_uniform():
    values = counter.uniform(3, np.arange(100_000), 7)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(axis=1) - 0.5).max() < 0.005
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 0.02


@given(seed=st.integers(0, 2**63), records=st.integers(1, 700), epoch=st.integers(0, 2**31))
def test_every_epoch_visits_every_record_once(seed, records, epoch):
    ids = order.record_of(seed, np.arange(epoch * records, (epoch + 1) * records), records)
    assert sorted(ids) == list(range(records))


@given(records=st.integers(1, 10**9), start=st.integers(0, 10**15), cut=st.integers(0, 50))
def test_any_part_of_the_sequence_is_found_without_the_rest(records, start, cut):
    whole = order.record_of(1, np.arange(start, start + 50), records)
    parts = [order.record_of(1, np.arange(start, start + cut), records)]
    parts.append(order.record_of(1, np.arange(start + cut, start + 50), records))
    assert np.array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ_and_are_shuffled():
    n = 1000
    first, second = (order.record_of(0, np.arange(e * n, (e + 1) * n), n) for e in (0, 1))
    other = order.record_of(1, np.arange(n), n)
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert (a == b).mean() < 0.02
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_an_empty_dataset_and_a_negative_position_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        order.record_of(0, np.arange(3), 0)
    with pytest.raises(ValueError, match="start at 0"):
        order.record_of(0, np.array([-1]), 5)
