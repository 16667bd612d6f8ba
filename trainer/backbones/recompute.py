"""Recomputation of a block's activations in the backward pass, instead of keeping them.

It saves the memory of a deep network's activations and costs one more forward pass. Values and gradients are
unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, map: Tensor, *, recompute: bool) -> Any:
    """Return the output of `block` for `map`; with `recompute`, keep only `map` for the backward pass.

    The recomputation uses the same dropout masks, and BatchNorm's running statistics are updated only once.
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
    """Let BatchNorms update copies of their running statistics: the forward pass has updated them."""
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
