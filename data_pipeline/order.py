"""Which record is sample number p of the run: a permutation that is computed, not stored.

Epoch e = p // N visits all N records once, in the order of a Feistel network keyed by (seed, e) over
the smallest even number of bits that holds N; values beyond N are sent through again until they fall
inside ("cycle walking"), which keeps it a permutation. O(1) memory and O(1) time for any position.
"""

from __future__ import annotations

import numpy as np

from data_pipeline import counter

_ROUNDS = 6
_STREAM = 1


def record_of(seed: int, position_N: np.ndarray, records: int) -> np.ndarray:
    """Record ids [N] int64 in [0, records) of the samples at `position_N` of the infinite sequence.

    Raises ValueError for an empty dataset or a negative position.
    """
    position_N = np.asarray(position_N, np.int64)
    if records < 1:
        raise ValueError(f"the order of {records} records: at least one is needed")
    if (position_N < 0).any():
        raise ValueError("sample positions start at 0")
    epoch_N = (position_N // records).astype(np.uint64)
    value_N = (position_N % records).astype(np.uint64)
    half_bits = max(1, (max(records - 1, 1).bit_length() + 1) // 2)
    outside_N = np.ones(len(value_N), bool)
    while outside_N.any():
        value_N[outside_N] = _feistel(seed, epoch_N[outside_N], value_N[outside_N], half_bits)
        outside_N = value_N >= records
    return value_N.astype(np.int64)


def _feistel(seed: int, epoch_N: np.ndarray, value_N: np.ndarray, half_bits: int) -> np.ndarray:
    """One pass of the network over 2 * half_bits bits; a bijection for every epoch."""
    mask = np.uint64((1 << half_bits) - 1)
    left_N, right_N = value_N >> np.uint64(half_bits), value_N & mask
    for round_number in range(_ROUNDS):
        stream = _STREAM << 32 | round_number
        mixed_N = counter.words(seed, right_N | epoch_N << np.uint64(32), stream)[0].astype(np.uint64)
        left_N, right_N = right_N, left_N ^ (mixed_N & mask)
    return left_N << np.uint64(half_bits) | right_N
