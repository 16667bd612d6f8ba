"""The share of useful time: against a simulation, and the best interval against a search."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goodput import best_interval, goodput


def simulated(interval, hold, restart, mean, checkpoints):
    """Simulate `checkpoints` intervals with random failures; return the share of useful time."""
    dice = np.random.default_rng(1)
    time = 0.0
    for _ in range(checkpoints):
        needed = interval + hold
        while (failure := dice.exponential(mean)) < needed:
            time += failure
            # A restart can fail too, and is then repeated.
            needed = restart + interval + hold
        time += needed
    return checkpoints * interval / time


def test_goodput_is_that_of_a_simulated_run():
    for interval, hold, mean in ((100, 5, 300), (300, 20, 1000), (50, 1, 2000)):
        found = simulated(interval, hold, 0, mean, 40_000)
        expected = goodput(interval, hold_s=hold, restart_s=0, mean_time_between_failures_s=mean)
        assert found == pytest.approx(expected, rel=0.02)


def test_goodput_with_restarts_is_close_if_failures_are_rare():
    found = simulated(100, 5, 60, 3000, 40_000)
    expected = goodput(100, hold_s=5, restart_s=60, mean_time_between_failures_s=3000)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("mean", [600, 3600, 86_400])
@pytest.mark.parametrize("hold", [0.5, 5, 60])
def test_no_interval_is_better_than_the_best(mean, hold):
    def share(interval):
        return goodput(interval, hold_s=hold, restart_s=300, mean_time_between_failures_s=mean)

    best = best_interval(hold_s=hold, mean_time_between_failures_s=mean)
    searched = max((best * factor for factor in np.geomspace(0.05, 20, 2001)), key=share)
    assert best == pytest.approx(searched, rel=0.01)
    assert best == pytest.approx(math.sqrt(2 * hold * mean), rel=0.3)


def test_the_limits():
    rare = {"hold_s": 1, "restart_s": 100, "mean_time_between_failures_s": 1e12}
    assert goodput(99, **rare) == pytest.approx(0.99)
    assert goodput(1e9, hold_s=1, restart_s=0, mean_time_between_failures_s=1) == pytest.approx(0)
    assert best_interval(hold_s=10, mean_time_between_failures_s=5) == 5


def test_the_table_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [\d.]+ h \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 5
    for processes, cells in rows:
        mean_s = 365 * 24 * 3600 / int(processes)
        expected = []
        for hold_s, restart_s in ((1, 330), (30, 300)):
            best_s = best_interval(hold_s=hold_s, mean_time_between_failures_s=mean_s)
            share = goodput(best_s, hold_s=hold_s, restart_s=restart_s, mean_time_between_failures_s=mean_s)
            expected += [f"{best_s:.0f} s", f"{share:.2%}"]
        hourly = goodput(3600, hold_s=30, restart_s=300, mean_time_between_failures_s=mean_s)
        assert [cell.strip() for cell in cells.split("|")] == [*expected, f"{hourly:.2%}"]
