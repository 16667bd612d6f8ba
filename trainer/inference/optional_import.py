"""Packages that only some commands need: the extras of pyproject.toml bring them."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str, extra: str) -> Any:
    """The module `name`. Raises ValueError, which says what to install, if its package is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this needs the package {name.partition('.')[0]}, which cannot be imported ({error}); "
            f"install the extra `{extra}`: pip install -e '.[{extra}]'"
        ) from error
