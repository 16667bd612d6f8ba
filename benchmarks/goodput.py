"""Goodput of a run with failures: the expected share of its time spent on steps that are not lost.

Failures are random with mean time M between them. After a failure the run needs `restart_s` until it trains
again from its last checkpoint. After every `interval_s` of training a save delays it by `hold_s`. With
failures also during restart and save, the expected time from one checkpoint to the next is (J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", 2006):

    M exp(restart / M) (exp((interval + hold) / M) - 1)

The time to write an asynchronous checkpoint is lost at each failure too, so it is part of `restart_s`.
"""

from __future__ import annotations

import math


def goodput(
    interval_s: float, *, hold_s: float, restart_s: float, mean_time_between_failures_s: float
) -> float:
    """Return the expected share of useful time, 0 to 1, with a checkpoint after every `interval_s`."""
    mean_s = mean_time_between_failures_s
    # exp overflows beyond this exponent; the share is then 0.
    exponent = min((interval_s + hold_s) / mean_s, 700.0)
    return interval_s / mean_s * math.exp(-restart_s / mean_s) / math.expm1(exponent)


def best_interval(*, hold_s: float, mean_time_between_failures_s: float) -> float:
    """Return the interval of the largest goodput, seconds: Daly's, which refines Young's sqrt(2 hold M).

    It is within 1 % of the optimum if hold_s is less than half the mean time between failures.
    """
    mean_s = mean_time_between_failures_s
    if hold_s >= 2 * mean_s:
        return mean_s
    ratio = hold_s / (2 * mean_s)
    return math.sqrt(2 * hold_s * mean_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - hold_s
