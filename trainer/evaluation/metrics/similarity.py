"""Cosine similarities of very many embeddings, without ever holding all of them.

Shapes: N embeddings, D dimensions, M pairs of them, P probes, G of a gallery, C of a chunk of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Rows of a float32 [N, 512] that are looked at together: 32 MiB.
_ROWS = 16384
# Similarities that are held together, float32: 128 MiB.
_SIMILARITIES = 1 << 25


def chunks(length: int, size: int = _ROWS) -> Iterator[slice]:
    """Slices of at most `size` that cover range(length)."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def unit_rows(emb_ND: np.ndarray) -> np.ndarray:
    """A float32 copy with rows of length 1, but for rows of zeros, which stay."""
    emb_ND = np.array(emb_ND, np.float32)
    emb_ND /= np.maximum(np.linalg.norm(emb_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return emb_ND


def pair_similarity(unit_ND: np.ndarray, left_M: np.ndarray, right_M: np.ndarray) -> np.ndarray:
    """Float32 [M]: the similarity of rows `left_M` and `right_M` of embeddings of length 1."""
    similarity_M = np.empty(len(left_M), np.float32)
    for part in chunks(len(left_M)):
        similarity_M[part] = np.einsum("md,md->m", unit_ND[left_M[part]], unit_ND[right_M[part]])
    return similarity_M


def gallery_similarity(
    unit_PD: np.ndarray, emb_ND: np.ndarray, row_G: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of `row_G`, and float32 [P, C], the similarities of all probes to those rows of `emb_ND`.

    The probes have length 1; the rows may be of any length, and may lie in a memory map.
    """
    for part in chunks(len(row_G), max(1, _SIMILARITIES // max(1, len(unit_PD)))):
        yield part, unit_PD @ unit_rows(emb_ND[row_G[part]]).T
