"""Sampling of the classes of a step: the classes of the step's own samples and those that a hash draws.

A class is drawn if its hash of (seed, step, class) is below the sample rate. This needs neither a generator
nor communication: the set is the same on any number of ranks, and every rank computes its own part.
The hash is SplitMix64's output function over a key of (seed, step).
Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 13.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from partial_fc.partition import tiles

_GOLDEN = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_BITS = 53
# Classes hashed at once: few enough int64 numbers for a CPU's cache, enough to occupy a GPU.
_CPU_BLOCK, _GPU_BLOCK = 1 << 16, 1 << 22


class Sample:
    """Rows of a shard in ascending order. `row_S` is None for all `rows`: indexing then gives views."""

    def __init__(self, rows: int, row_S: Tensor | None = None) -> None:
        self._row_S = row_S
        self._count = rows if row_S is None else len(row_S)

    def __len__(self) -> int:
        return self._count

    def tiles(self, tile: int) -> Iterator[tuple[int, slice | Tensor]]:
        """Yield consecutive tiles of at most `tile` rows, each as (position of its first row, rows)."""
        for part in tiles(self._count, tile):
            yield part.start, part if self._row_S is None else self._row_S[part]

    @property
    def rows(self) -> slice | Tensor:
        """All rows, as an index into the shard."""
        return slice(0, self._count) if self._row_S is None else self._row_S

    def row_at(self, position_G: Tensor) -> Tensor:
        """Return the rows at given positions of the sample."""
        return position_G if self._row_S is None else self._row_S[position_G]

    def position_of(self, row_G: Tensor) -> Tensor:
        """Return each row's position in the sample; -1 where `row_G` is -1. Other rows must be in it."""
        if self._row_S is None:
            return row_G
        return torch.where(row_G >= 0, torch.searchsorted(self._row_S, row_G), -1)


def draw(rate: float, seed: int, step: int, classes: range, label_N: Tensor) -> Sample:
    """Return the rows of the shard `classes` that take part in `step`, on the device of `label_N`.

    label_N: int64, the labels of all samples of the step, of all ranks; labels outside `classes` are skipped.
    """
    if rate == 1:
        return Sample(len(classes))
    is_in_R = is_drawn(rate, seed, step, classes, label_N.device)
    ours_N = label_N[(label_N >= classes.start) & (label_N < classes.stop)]
    is_in_R[ours_N - classes.start] = True
    return Sample(len(classes), is_in_R.nonzero()[:, 0])


def is_drawn(rate: float, seed: int, step: int, classes: range, device: torch.device) -> Tensor:
    """Return bool [R]: for every class of a range, True if the hash draws it."""
    key = _mix_int(_mix_int(seed + _GOLDEN) + step)
    limit = int(rate * 2**_BITS)
    block = _GPU_BLOCK if device.type == "cuda" else _CPU_BLOCK
    is_in_R = torch.empty(len(classes), dtype=torch.bool, device=device)
    for part in tiles(len(classes), block):
        first, last = classes.start + part.start, classes.start + part.stop
        hash_N = torch.arange(first, last, device=device).mul_(_signed(_GOLDEN)).add_(_signed(key))
        torch.lt(_shifted(_mix(hash_N), 64 - _BITS), limit, out=is_in_R[part])
    return is_in_R


def _mix(number_N: Tensor) -> Tensor:
    """Apply SplitMix64's output function to 64-bit words in place; int64 products wrap as uint64 ones do."""
    for shift, factor in _STEPS:
        number_N.bitwise_xor_(_shifted(number_N, shift)).mul_(_signed(factor))
    return number_N.bitwise_xor_(_shifted(number_N, _LAST_SHIFT))


def _shifted(number_N: Tensor, shift: int) -> Tensor:
    """Shift right as if unsigned: a shift of int64 fills with copies of the sign bit."""
    return (number_N >> shift).bitwise_and_((1 << 64 - shift) - 1)


def _mix_int(number: int) -> int:
    return int(_mix(torch.tensor([_signed(number)]))) & (1 << 64) - 1


def _signed(word: int) -> int:
    """Return the int64 with the same bits as an unsigned word, taken modulo 2^64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)
