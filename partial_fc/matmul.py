"""Matrix products of factors that may be rounded first, summed in float32: what matrix units are fast at.

The one place that knows what each device's libraries offer for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Inputs = Literal["fp32", "tf32", "bf16"]


class Products:
    """Products of factors in `dtype`: bfloat16 for "bf16", else that of the rows."""

    def __init__(self, inputs: Inputs, rows: torch.dtype) -> None:
        self.dtype = torch.bfloat16 if inputs == "bf16" else rows
        self._rows = rows
        self._is_tf32 = inputs == "tf32"

    def __call__(self, left_MK: Tensor, right_KN: Tensor) -> Tensor:
        """[M, N] in the rows' type. On a CPU, those of bfloat16 are rounded to it once more at the end."""
        if self.dtype == self._rows:
            with _tf32(self._is_tf32 and left_MK.is_cuda):
                return left_MK @ right_KN
        if left_MK.is_cuda:
            return torch.mm(left_MK, right_KN, out_dtype=torch.float32).to(self._rows)
        return (left_MK @ right_KN).to(self._rows)


@contextmanager
def _tf32(is_wanted: bool) -> Iterator[None]:
    """cuBLAS may round float32 factors to TF32; PyTorch keeps that in a global."""
    if not is_wanted:
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
