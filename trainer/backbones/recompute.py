"""A block whose insides are forgotten after the forward pass and computed again in the backward pass.

The memory of a deep network's maps for the work of one more forward pass; values and gradients stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, map: Tensor, *, recompute: bool) -> Any:
    """What `block` makes of `map`; with `recompute` only `map` itself is kept for the backward pass.

    Random masks are drawn again as they were. BatchNorm's running statistics move once.
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(map)
    return checkpoint(
        block,
        map,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_at_rest(block)),
    )


@contextlib.contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Let BatchNorms move copies of their statistics: the forward pass has moved these already."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)
