"""The learning rate of a step: a pure function, so that nothing of it needs saving."""

from __future__ import annotations


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, power: float) -> float:
    """Rises linearly to `peak` over the first `warmup_steps`, then falls as (share of steps left) ** power.

    Step 0 is the first; the last of `steps` still has a rate above 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    left = (steps - step) / max(1, steps - warmup_steps)
    return peak * max(0.0, left) ** power
