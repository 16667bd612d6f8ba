"""Counter-based random numbers: Philox4x32-10 as a pure, vectorised function of integers.

Every random choice of a run is `uniform(seed, position, stream)`: it is the same on any rank, in any order.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the tests use its
published known-answer vectors.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter_4N: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return uint32 words [4, N] of Philox4x32-10 from counters [4, N] and a key of two 32-bit words."""
    c0, c1, c2, c3 = (row.astype(np.uint64) & _MASK for row in counter_4N)
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> _32) ^ c1 ^ k0, high & _MASK, (low >> _32) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def words(seed: int, position_N: np.ndarray, stream: int) -> np.ndarray:
    """Return four random uint32 words for every position: [4, N]. `stream` separates different uses."""
    position_N = np.asarray(position_N, np.uint64)
    counter_4N = np.stack(
        [
            position_N & _MASK,
            position_N >> _32,
            np.full_like(position_N, stream & 0xFFFFFFFF),
            np.full_like(position_N, stream >> 32),
        ]
    )
    return philox(counter_4N, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


def uniform(seed: int, position_N: np.ndarray, stream: int) -> np.ndarray:
    """Return four independent float64 numbers in [0, 1) for every position: [4, N]."""
    return words(seed, position_N, stream) * 2.0**-32
