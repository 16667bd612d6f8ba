"""Cosine similarities of large numbers of embeddings, computed in chunks of bounded memory.

Shapes: N embeddings, D dimensions, M pairs of them, P probes, G of a gallery, C of a chunk of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Rows per chunk: 32 MiB of float32 [N, 512].
_ROWS = 16384
# Similarities per chunk: 128 MiB of float32.
_SIMILARITIES = 1 << 25


def chunks(length: int, size: int = _ROWS) -> Iterator[slice]:
    """Return consecutive slices of at most `size` that cover range(length)."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def unit_rows(emb_ND: np.ndarray) -> np.ndarray:
    """Return a float32 copy with rows of norm 1; rows of zeros stay zero."""
    emb_ND = np.array(emb_ND, np.float32)
    emb_ND /= np.maximum(np.linalg.norm(emb_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return emb_ND


def pair_similarity(unit_ND: np.ndarray, left_M: np.ndarray, right_M: np.ndarray) -> np.ndarray:
    """Return the similarities, float32 [M], of rows `left_M` and `right_M` of unit embeddings."""
    similarity_M = np.empty(len(left_M), np.float32)
    for part in chunks(len(left_M)):
        similarity_M[part] = np.einsum("md,md->m", unit_ND[left_M[part]], unit_ND[right_M[part]])
    return similarity_M


def gallery_similarity(
    unit_PD: np.ndarray, emb_ND: np.ndarray, row_G: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of `row_G`, each with the similarities, float32 [P, C], of all probes to these rows.

    unit_PD: probes of norm 1. emb_ND: embeddings of any norm; may be a memory map.
    """
    for part in chunks(len(row_G), max(1, _SIMILARITIES // max(1, len(unit_PD)))):
        yield part, unit_PD @ unit_rows(emb_ND[row_G[part]]).T
