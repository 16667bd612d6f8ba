"""Matrix products whose factors may be rounded first and whose sums are in float32, as on matrix units.

The differences between devices and their libraries are handled here only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Inputs = Literal["fp32", "tf32", "bf16"]


class Products:
    """Matrix products of factors in `dtype`: bfloat16 for "bf16", else the dtype of the rows."""

    def __init__(self, inputs: Inputs, rows: torch.dtype) -> None:
        self.dtype = torch.bfloat16 if inputs == "bf16" else rows
        self._rows = rows
        self._is_tf32 = inputs == "tf32"

    def __call__(self, left_MK: Tensor, right_KN: Tensor) -> Tensor:
        """Return the product [M, N] in the rows' dtype; a CPU rounds a product of bfloat16 to bfloat16."""
        if self.dtype == self._rows:
            with _tf32(self._is_tf32 and left_MK.is_cuda):
                return left_MK @ right_KN
        if left_MK.is_cuda:
            return torch.mm(left_MK, right_KN, out_dtype=torch.float32).to(self._rows)
        return (left_MK @ right_KN).to(self._rows)


@contextmanager
def _tf32(is_wanted: bool) -> Iterator[None]:
    """Allow cuBLAS to round float32 factors to TF32 inside the block, if wanted."""
    if not is_wanted:
        yield
        return
    # PyTorch has this as a global setting only.
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
