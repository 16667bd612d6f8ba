"""The learning rate: warm-up, decay, and its ends."""

import pytest

from trainer.config import learning_rate


def rates(**options):
    return [learning_rate(step, **options) for step in range(options["steps"])]


def test_rises_to_the_peak_and_falls_to_nearly_nothing():
    found = rates(peak=0.4, warmup_steps=10, steps=110, power=2.0)
    assert found[0] == pytest.approx(0.4 / 11)
    assert found[10] == max(found) == 0.4
    assert found[:11] == sorted(found[:11])
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[60] == pytest.approx(0.4 * 0.5**2)
    assert found[-1] == pytest.approx(0.4 * 0.01**2)


def test_without_warmup_begins_at_the_peak():
    assert rates(peak=0.1, warmup_steps=0, steps=5, power=1.0) == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])


def test_a_warmup_as_long_as_the_run_stays_positive():
    assert all(rate > 0 for rate in rates(peak=0.1, warmup_steps=8, steps=8, power=2.0))
