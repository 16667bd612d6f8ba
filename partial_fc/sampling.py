"""Which classes take part in a step: those that a hash draws, and those that the step's samples belong to.

A class is drawn when its hash of (seed, step, class) falls under the sample rate. That needs neither a
generator nor communication: the set is the same on any number of ranks, and every rank finds its own part.
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
# Classes hashed at once: int64 numbers that stay in a CPU's cache, and keep a GPU busy.
_CPU_BLOCK, _GPU_BLOCK = 1 << 16, 1 << 22


class Sample:
    """Rows of a shard, ascending. `row_S` is None for all `rows` of them: they are then views, not copies."""

    def __init__(self, rows: int, row_S: Tensor | None = None) -> None:
        self._row_S = row_S
        self._count = rows if row_S is None else len(row_S)

    def __len__(self) -> int:
        return self._count

    def tiles(self, tile: int) -> Iterator[tuple[int, slice | Tensor]]:
        """Position of the first, and the rows themselves, of consecutive pieces of at most `tile` rows."""
        for part in tiles(self._count, tile):
            yield part.start, part if self._row_S is None else self._row_S[part]

    @property
    def rows(self) -> slice | Tensor:
        """All of them, as an index."""
        return slice(0, self._count) if self._row_S is None else self._row_S

    def row_at(self, position_G: Tensor) -> Tensor:
        """The rows at given positions."""
        return position_G if self._row_S is None else self._row_S[position_G]

    def position_of(self, row_G: Tensor) -> Tensor:
        """Where each row stands in the sample; -1 where `row_G` is -1. Others must be in it."""
        if self._row_S is None:
            return row_G
        return torch.where(row_G >= 0, torch.searchsorted(self._row_S, row_G), -1)


def draw(rate: float, seed: int, step: int, classes: range, label_N: Tensor) -> Sample:
    """The rows of the shard `classes` that take part in `step`, on the device of `label_N`.

    label_N: int64, the labels of all samples of the step, of all ranks; those outside `classes` are not ours.
    """
    if rate == 1:
        return Sample(len(classes))
    is_in_R = is_drawn(rate, seed, step, classes, label_N.device)
    ours_N = label_N[(label_N >= classes.start) & (label_N < classes.stop)]
    is_in_R[ours_N - classes.start] = True
    return Sample(len(classes), is_in_R.nonzero()[:, 0])


def is_drawn(rate: float, seed: int, step: int, classes: range, device: torch.device) -> Tensor:
    """For every class of a range, whether the hash draws it: bool [R]."""
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
    """SplitMix64's output function on 64-bit words, in place; int64, whose products wrap around alike."""
    for shift, factor in _STEPS:
        number_N.bitwise_xor_(_shifted(number_N, shift)).mul_(_signed(factor))
    return number_N.bitwise_xor_(_shifted(number_N, _LAST_SHIFT))


def _shifted(number_N: Tensor, shift: int) -> Tensor:
    """Shift right as if unsigned: int64 would fill up with copies of the sign."""
    return (number_N >> shift).bitwise_and_((1 << 64 - shift) - 1)


def _mix_int(number: int) -> int:
    return int(_mix(torch.tensor([_signed(number)]))) & (1 << 64) - 1


def _signed(word: int) -> int:
    """The int64 of the same bits as an unsigned word, taken modulo 2^64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)
