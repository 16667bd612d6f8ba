"""The number of texts that a pattern with braces stands for, computed before it is expanded.

    {000..099}   a range: 100      {a,b}   a list: 2      {a,b}/{0..9}   a product: 20      {x}   itself: 1

A pattern of a few bytes can stand for more texts than the memory holds, and `braceexpand` creates all texts
of a pair of braces at once.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from data_pipeline.common.redaction import redacted

MOST_SHARDS = 1_000_000
_MOST_CHARS = 1 << 28
_MOST_LEVELS = 16
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_LONGEST_NUMBER = 18
_MOST = 10**_LONGEST_NUMBER
# Stands for a pair of braces of which the number is known; no URL has this character.
_COUNTED = re.compile("\0([0-9]+)\0")
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


def require_few(patterns: Sequence[str]) -> None:
    """Raise ValueError, which names the pattern, if the patterns stand for more than MOST_SHARDS texts."""
    shards = chars = 0
    for pattern in patterns:
        count = count_of(pattern)
        shards, chars = shards + count, chars + count * len(pattern)
        if shards > MOST_SHARDS or chars > _MOST_CHARS:
            raise ValueError(
                f"data.shards: expected at most {MOST_SHARDS} shards with {_MOST_CHARS} characters in all, "
                f"found {shards} up to {redacted(pattern)[:200]!r}; correct its braces"
            )


def count_of(pattern: str) -> int:
    """Return the number of texts, or a larger one if braces are not in pairs.

    Raises ValueError for braces inside each other on too many levels.
    """
    rest = pattern.replace("\0", "")
    for _ in range(_MOST_LEVELS):
        rest, found = _INNERMOST.subn(lambda braces: f"\0{_count_of_braces(braces[1])}\0", rest)
        if not found:
            return _product(rest)
    raise ValueError(
        f"data.shards: expected braces on at most {_MOST_LEVELS} levels, found more in "
        f"{redacted(pattern)[:200]!r}; write more patterns instead"
    )


def _count_of_braces(inner: str) -> int:
    found = _RANGE.fullmatch(inner)
    if found is None:
        return sum(map(_product, inner.split(",")))
    if max(len(group or "") for group in found.groups()) > _LONGEST_NUMBER:
        return _MOST
    first, last, step, first_letter, last_letter, letter_step = found.groups()
    if first is None:
        first, last, step = _LETTERS.index(first_letter), _LETTERS.index(last_letter), letter_step
    return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1


def _product(text: str) -> int:
    """Return the product of the numbers in a text, at most _MOST."""
    product = 1
    for number in _COUNTED.findall(text):
        product = min(product * int(number), _MOST)
    return product
