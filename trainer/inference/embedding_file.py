"""Embeddings of images as a file: .npz for NumPy, .parquet for other programs. Both hold the same columns.

    path            the image file
    embedding       float32 [D]: its direction represents the identity
    quality         float32: the norm of the embedding
    branch_norm, branch_quality, branch_weight
                    float32 [K] each, for a network with branches: the norm of each branch's feature, the
                    standardised norm, and the attention weight
    error           text: the reason why the file could not be read as an image, else empty; with an error,
                    the row's numbers are NaN

An .npz is collected in memory: 2 GB for a million embeddings of 512 dimensions, and twice that while it is
written. A .parquet is written incrementally. Values that apply to all rows are arrays without dimensions, or
the schema's metadata.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.inference.optional_import import require

# Groups of a few MB, a size that suits readers.
_GROUP_ROWS = 8192

Columns = dict[str, np.ndarray]


class EmbeddingFile(Protocol):
    """A file to which rows are appended in order, each time with the same columns."""

    def write(self, columns: Columns) -> None:
        """Append one or more rows."""

    def close(self) -> None:
        """Write the remaining rows; call it after the last `write`."""


def opener(out: Path) -> Callable[[Path, dict[str, str]], EmbeddingFile]:
    """Return the constructor for the suffix of `out`; it takes the path and values that apply to all rows.

    Raises ValueError for an unknown suffix or a missing package.
    """
    if out.suffix == ".parquet":
        require("pyarrow", "parquet")
    if out.suffix not in _KINDS:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(_KINDS)}, found {out.suffix!r}")
    return _KINDS[out.suffix]


class Npz:
    """An .npz file, written when it is closed."""

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
    """A .parquet file with one row per image, written in row groups."""

    def __init__(self, out: Path, facts: dict[str, str]) -> None:
        self._arrow, self._parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        self._out, self._facts = out, facts
        self._writer: Any = None
        self._waiting: list[Any] = []

    def write(self, columns: Columns) -> None:
        """Keep the rows, and write a row group once it is full."""
        table = self._arrow.table({name: self._column(values) for name, values in columns.items()})
        self._waiting.append(table.replace_schema_metadata(self._facts))
        if sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the last row group and the footer."""
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
