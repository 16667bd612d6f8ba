"""Axes hold their values and have few, round, different ticks; curves lie where they should."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report.charts import Axis, Band, Dots, Line, Mark, chart, percent, plain, power_of_ten

VALUES = st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=1, max_size=9)


@given(value_N=VALUES, ticks=st.integers(2, 8))
def test_a_round_axis_holds_all_values_between_its_outer_ticks(value_N, ticks):
    axis = Axis.round(value_N, ticks=ticks)
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(value_N)
    assert axis.high + slack >= max(value_N)
    assert 2 <= len(axis.ticks) <= ticks + 2
    gaps = [b - a for a, b in itertools.pairwise(axis.ticks)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    assert gaps[0] > 0


@given(step_N=st.lists(st.integers(0, 10**7), min_size=1, max_size=9))
def test_a_tight_axis_ends_at_the_values_and_its_ticks_lie_within(step_N):
    axis = Axis.tight(step_N)
    if min(step_N) < max(step_N):
        assert (axis.low, axis.high) == (min(step_N), max(step_N))
    assert axis.low < axis.high
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 1 <= len(axis.ticks) <= 6


@pytest.mark.parametrize(
    ("value_N", "ticks"),
    [
        ([0, 1], ["0", "0.25", "0.5", "0.75", "1"]),
        ([0.013, 0.29], ["0", "0.1", "0.2", "0.3"]),
        ([0, 24.7], ["0", "10", "20", "30"]),
        ([-3, 1500], ["-500", "0", "500", "1,000", "1,500"]),
        ([0, 2_000_000], ["0", "500k", "1M", "1.5M", "2M"]),
        ([7, 7], ["2", "4", "6", "8", "10", "12"]),
        ([0, 0], ["-1", "-0.5", "0", "0.5", "1"]),
        ([0, 1e-7], ["0", "2.5e-08", "5e-08", "7.5e-08", "1e-07"]),
    ],
)
def test_ticks_are_numbers_that_people_would_choose(value_N, ticks):
    axis = Axis.round(value_N)
    assert [axis.text(tick) for tick in axis.ticks] == ticks


def test_numbers_as_text():
    assert [plain(value) for value in (0, 0.05, -1234, 9999, 25_000, 3e6, 2e9)] == [
        "0", "0.05", "-1,234", "9,999", "25k", "3M", "2G",
    ]  # fmt: skip
    assert percent(0.125) == "12.5 %"
    assert [power_of_ten(value) for value in (1, 0.1, 1e-12)] == ["10⁰", "10⁻¹", "10⁻¹²"]


def test_decades():
    axis = Axis.decades(0.0005)
    assert axis.ticks == pytest.approx([1e-3, 1e-2, 1e-1, 1])
    assert axis.at([0, 0.0005, 1, 0.0005**0.5]).tolist() == pytest.approx([0, 0, 1, 0.5])


UNIT = Axis(0, 1, [0, 1])


def path_of(part):
    return re.search(' d="([^"]*)"', part.svg(UNIT, UNIT))[1]


def test_curves_lie_where_they_should():
    assert path_of(Line([0, 0.5, 1], [0, 1, 0.25])) == "M0 1000L500 0L1000 750h.01"
    assert path_of(Band([0, 1], [0, 0.1], [0.5, 1])) == "M0 500L1000 0L1000 900L0 1000Z"
    assert path_of(Dots([0.2], [0.3], ["here"])) == "M200 700h.01"
    assert path_of(Mark(0.25, "here")) == "M250 0V1000"


def test_points_on_one_spot_are_drawn_once():
    many_N = [i / 1e6 for i in range(1_000_001)]
    assert path_of(Line(many_N, [0.5] * len(many_N))).count("L") == 1000


def test_all_texts_are_escaped_and_only_named_lines_are_in_the_key():
    drawn = [Line([0], [0], "<1>", colour=7), Line([0], [0]), Dots([0], [0], ["<2>"]), Mark(0, "<3>")]
    html = chart("<4>", drawn, UNIT, Axis(0, 1, [0], lambda _: "<5>"), x_title="<6>", value="<7>")
    assert not re.search(r"<\d", html)
    assert set(re.findall(r"&lt;(\d)&gt;", html)) == set("1234567")
    assert re.findall("<li[^>]*>", html) == ['<li class="c1">']
