"""The order of samples: the record of sample number p, by a permutation that is computed, not stored.

Epoch e = p // N visits all N records once. Any position takes O(1) memory and O(1) time. The full shuffle
permutes all records with a Feistel network keyed by (seed, e). The block shuffle is for disks and file
systems that are fast only for sequential reads: it permutes blocks of neighbouring records, and then the
samples inside each window of blocks, so that a window is read as a few long runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline import philox

_ROUNDS = 6
_RECORDS, _BLOCKS, _WINDOWS, _CUTS = 1, 3, 4, 5


class Blocks(NamedTuple):
    """A block shuffle: `size` records in a block, `window` blocks whose samples are mixed."""

    size: int
    window: int


def record_of(seed: int, position_N: np.ndarray, records: int, blocks: Blocks | None = None) -> np.ndarray:
    """Return record ids [N] int64 in [0, records) of the samples at `position_N` of the infinite sequence.

    Without `blocks`, the shuffle is full. Raises ValueError for an empty dataset or a negative position.
    """
    position_N = np.asarray(position_N, np.int64)
    if records < 1:
        raise ValueError(f"expected at least one record to shuffle, found {records}")
    if (position_N < 0).any():
        raise ValueError(f"expected sample positions that start at 0, found {int(position_N.min())}")
    epoch_N, within_N = np.divmod(position_N, records)
    if blocks is None:
        return _permuted(seed, _RECORDS, epoch_N, within_N, records, records)
    return _in_blocks(seed, epoch_N, within_N, records, blocks)


def _in_blocks(
    seed: int, epoch_N: np.ndarray, within_N: np.ndarray, records: int, blocks: Blocks
) -> np.ndarray:
    mixed = min(blocks.size * blocks.window, records)
    windows = -(-records // mixed)
    window_N, at_N = np.divmod(within_N, mixed)
    size_N = np.minimum(mixed, records - window_N * mixed)
    number_N = epoch_N * windows + window_N
    place_N = window_N * mixed + _permuted(seed, _WINDOWS, number_N, at_N, size_N, mixed)
    full = records // blocks.size
    # The records of the incomplete last block come last in their epoch.
    block_N, at_N = np.divmod(place_N, blocks.size)
    is_full_N = block_N < full
    block_N[is_full_N] = _permuted(seed, _BLOCKS, epoch_N[is_full_N], block_N[is_full_N], full, full)
    # Every epoch starts its blocks at another offset, so that the records that come last differ.
    cut_N = philox.words(seed, epoch_N, _CUTS << 32)[0] % np.uint32(blocks.size)
    return (block_N * blocks.size + at_N + cut_N.astype(np.int64)) % records


def _permuted(
    seed: int, stream: int, key_N: np.ndarray, value_N: np.ndarray, size_N: np.ndarray | int, largest: int
) -> np.ndarray:
    """Return the image int64 of each value under the permutation of [0, size) of (seed, stream, key).

    `largest` bounds all sizes that can occur: the network's width must not depend on the requested values.
    """
    key_N, value_N = key_N.astype(np.uint64), value_N.astype(np.uint64)
    half_bits = max(1, (max(largest - 1, 1).bit_length() + 1) // 2)
    # Cycle walking: a value outside [0, size) passes the network again, which keeps the map a permutation.
    outside_N = np.ones(len(value_N), bool)
    while outside_N.any():
        value_N[outside_N] = _feistel(seed, stream, key_N[outside_N], value_N[outside_N], half_bits)
        outside_N = value_N >= np.asarray(size_N, np.uint64)
    return value_N.astype(np.int64)


def _feistel(seed: int, stream: int, key_N: np.ndarray, value_N: np.ndarray, half_bits: int) -> np.ndarray:
    """Apply the network once to 2 * half_bits bits; it is a bijection for every key."""
    mask = np.uint64((1 << half_bits) - 1)
    left_N, right_N = value_N >> np.uint64(half_bits), value_N & mask
    for round_number in range(_ROUNDS):
        mixed_N = philox.words(seed, right_N | key_N << np.uint64(32), stream << 32 | round_number)[0]
        left_N, right_N = right_N, left_N ^ (mixed_N.astype(np.uint64) & mask)
    return left_N << np.uint64(half_bits) | right_N
