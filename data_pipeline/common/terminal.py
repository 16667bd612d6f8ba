"""Output of messages, in which control characters from file names and files are shown instead of sent."""

from __future__ import annotations

import re
import sys

# All control characters except tab and newline, line separators, surrogates (bytes of a file name that are no
# text), and the characters that change the direction of text.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: str) -> str:
    """Return a text with its control characters escaped as in Python: ESC as \\x1b."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def echo(message: str, *, err: bool = False) -> None:
    """Print a message on standard output, or on standard error, with its control characters escaped."""
    print(printable(message), file=sys.stderr if err else sys.stdout, flush=True)
