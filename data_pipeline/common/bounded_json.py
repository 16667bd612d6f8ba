"""JSON of files from any source: of bounded depth, so that no later use of the values recurses too deeply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.common.data_file import read_data_file

_MOST_LEVELS = 64


def parse(text: str | bytes) -> Any:
    """Return the values of a JSON text. Raises ValueError if it is no JSON or nested too deeply."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"JSON of more than {_MOST_LEVELS} levels") from None
    level = [values]
    for _ in range(_MOST_LEVELS):
        tables = [one for one in level if isinstance(one, dict | list)]
        if not tables:
            return values
        level = [value for one in tables for value in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"JSON of more than {_MOST_LEVELS} levels")


def read(path: Path, at_most: int) -> Any:
    """Return the values in a file. Raises ValueError as `parse` does, OSError as `read_data_file` does."""
    return parse(read_data_file(path, at_most))
