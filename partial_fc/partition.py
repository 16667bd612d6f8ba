"""Index arithmetic for the range of classes that each rank owns.

The ranges are those of torch.chunk and DTensor's Shard(0): ceil(C / W) classes for the first ranks, fewer
or none for the last ones. A checkpoint written by one number of ranks can therefore be read by any other.
"""

from __future__ import annotations


def class_range(num_classes: int, rank: int, world_size: int) -> range:
    """Return the classes of `rank`, possibly none."""
    share = -(-num_classes // world_size)
    start = min(rank * share, num_classes)
    return range(start, min(start + share, num_classes))


def tiles(rows: int, tile: int) -> list[slice]:
    """Return consecutive slices of at most `tile` rows that cover `rows` rows once."""
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]
