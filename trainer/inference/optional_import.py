"""Imports of packages that only some commands need and that the extras in pyproject.toml install."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str, extra: str) -> Any:
    """Import the module `name`. Raises ValueError, with the extra to install, if its package is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this command needs the package {name.partition('.')[0]}, which cannot be imported ({error}); "
            f"install the extra `{extra}`: pip install -e '.[{extra}]'"
        ) from error
