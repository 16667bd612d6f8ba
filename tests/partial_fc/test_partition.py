"""Class ranges: every class once, and where torch.chunk and so DTensor would put it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc import partition


@given(classes=st.integers(1, 300), world=st.integers(1, 40))
def test_ranges_are_those_of_torch_chunk(classes, world):
    chunks = [chunk.tolist() for chunk in torch.arange(classes).chunk(world)]
    chunks += [[]] * (world - len(chunks))
    assert [list(partition.class_range(classes, rank, world)) for rank in range(world)] == chunks


@given(rows=st.integers(0, 200), tile=st.integers(1, 250))
def test_tiles_cover_every_row_once(rows, tile):
    pieces = partition.tiles(rows, tile)
    assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
    assert all(0 < piece.stop - piece.start <= tile for piece in pieces)
