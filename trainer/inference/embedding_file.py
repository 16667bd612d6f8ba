"""Embeddings of pictures as a file: .npz for NumPy, .parquet for everything else. Both hold the same columns.

    path            the picture's file
    embedding       float32 [D]: its direction says who
    quality         float32: the embedding's length
    branch_norm, branch_quality, branch_weight
                    float32 [K] each, of a network with branches: the norm of each branch's feature, the same
                    standardised, and the attention that it got
    error           text: why the file is no picture, empty where it is one; the row's numbers are NaN then

An .npz is collected in memory, 2 GB for a million pictures with 512 numbers and twice that while it is
written; a .parquet is written as the rows come. What holds for all rows stands in arrays without dimension,
or in the schema's metadata.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.inference.optional_import import require

# A few MB at a time, as readers like it.
_GROUP_ROWS = 8192

Columns = dict[str, np.ndarray]


class EmbeddingFile(Protocol):
    """Takes rows in the order in which they are to stand, the same columns each time."""

    def write(self, columns: Columns) -> None:
        """Add rows, one or more."""

    def close(self) -> None:
        """Write what is left; to be called after all rows."""


def opener(out: Path) -> Callable[[Path, dict[str, str]], EmbeddingFile]:
    """What makes a file as `out` is called, given its path and what holds for all rows.

    Raises ValueError for an unknown suffix or a missing package.
    """
    if out.suffix == ".parquet":
        require("pyarrow", "parquet")
    if out.suffix not in _KINDS:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(_KINDS)}, found {out.suffix!r}")
    return _KINDS[out.suffix]


class Npz:
    """All rows in one .npz, which is written when it is closed."""

    def __init__(self, out: Path, facts: dict[str, str]) -> None:
        self._out, self._facts = out, facts
        self._parts: dict[str, list[np.ndarray]] = defaultdict(list)

    def write(self, columns: Columns) -> None:
        """Keep the rows."""
        for name, values in columns.items():
            self._parts[name].append(values)

    def close(self) -> None:
        """Write the file."""
        columns = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        arrays: dict[str, Any] = columns | self._facts
        np.savez(self._out, **arrays)


class Parquet:
    """One row per picture, written in groups."""

    def __init__(self, out: Path, facts: dict[str, str]) -> None:
        self._arrow, self._parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        self._out, self._facts = out, facts
        self._writer: Any = None
        self._waiting: list[Any] = []

    def write(self, columns: Columns) -> None:
        """Keep the rows, and write a group once it is full."""
        table = self._arrow.table({name: self._column(values) for name, values in columns.items()})
        self._waiting.append(table.replace_schema_metadata(self._facts))
        if sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the last group and the end of the file."""
        if self._waiting:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        group = self._arrow.concat_tables(self._waiting)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._out, group.schema)
        self._writer.write_table(group)
        self._waiting.clear()

    def _column(self, values: np.ndarray) -> Any:
        if values.ndim == 1:
            return self._arrow.array(values)
        return self._arrow.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])


_KINDS: dict[str, Callable[[Path, dict[str, str]], EmbeddingFile]] = {".npz": Npz, ".parquet": Parquet}
