"""Images arrive in order; only a few are loaded ahead of the consumer."""

import threading

import pytest

from trainer.inference.images import ahead


def test_order_batches_and_how_far_ahead():
    begun, lock = [], threading.Lock()

    def load(item):
        with lock:
            begun.append(item)
        return -item

    batches = ahead(load, range(23), batch_size=3, threads=4)
    taken = []
    for batch in batches:
        taken.append(batch)
        # The batch in hand and two that are being made ready.
        assert len(begun) <= 3 * (len(taken) + 2)
    assert taken == [[-item for item in range(start, min(start + 3, 23))] for start in range(0, 23, 3)]
    assert sorted(begun) == list(range(23))


def test_an_error_comes_with_its_batch_and_ends_the_work():
    begun = []

    def load(item):
        begun.append(item)
        if item == 4:
            raise ValueError("the fourth")
        return item

    batches = ahead(load, range(1000), batch_size=2, threads=2)
    assert [next(batches), next(batches)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="the fourth"):
        next(batches)
    assert len(begun) <= 10
    assert list(batches) == []
