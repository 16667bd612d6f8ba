"""Removal of credentials from URLs and shell commands, for messages, records and saved configurations.

    https://user:password@host/a.tar?part=7&sig=x  ->  https://***@host/a.tar?part=7&sig=***
    pipe:curl -H 'Authorization: Bearer x' URL     ->  pipe:curl ***

Of a command only the program is shown. Values of a URL's query are removed unless they are numbers or names
of shards. A credential in the path of a URL is not recognised, nor one in a text, such as the output of a
program, that is neither named like a credential nor part of the URL. The time
is linear in the length of the text.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from typing import Any

HIDDEN = "***"
# Shorter credentials are not searched for in other texts, because they occur in ordinary words.
_SHORTEST = 4

_COMMAND = re.compile(r"(?i)\s*pipe:\s*(?:([\w./+-]{1,80})(?=\s|$))?")
_WHOLE_URL = re.compile(r"\s*(?:[\w+.-]++:)?//")
# `host:` of scp, and one slash or backslashes after the protocol.
_MISSPELT = re.compile(r"\s*((?:[\w+.-]++:(?:/(?!/)|\\+))?)([^\s:/]*+:[^\s/:]\S*)(?=@)")
_CHAINED = re.compile(r"::(?=[\w+.-]++://)")
_URL = re.compile(r"""(?<![\w+.-])((?:[\w+.-]++:)?//)((?:[^\s/?#]*@)?[^\s'"<>|`]*+)""")
# A host of at most 255 characters with a port; an authority of another form contains a credential.
_HOST = re.compile(r"(?:\[[\da-fA-F:.%]{2,60}\]|[^:@\[\]]{0,255})(?::(?:\d{1,5}|\{[\d.,]+\}))?[:.,;)]*")
_PARAMETER = re.compile(r"([?&;#])([^?&;#=]*=)?([^?&;#]+)")
_PLAIN_VALUE = re.compile(r"\d{1,9}|\{\d{1,9}\.\.\d{1,9}\}|[\w./{},%-]*\.tar")
_SECRET = re.compile(
    r"(?i)authori[sz]ation|bearer|cookie|credential|passphrase|passw|pwd|secret|signature|token|x-auth|"
    r"(?:access|account|api|auth|private)[_-]?key"
)
_SHORT_SECRET = re.compile(r"(?i)(?:(?:^|[_-])(?:auth|jwt|key|pw|sas|sig)|pass)$")
# Parameters that change with the signature of a URL: those of S3, Google and Azure.
_SIGNED = re.compile(r"(?i)x-(?:amz|goog)-.*|expires|policy|code|otp|pin|se|st|ske|skt")

_WORD = re.compile(r"[\w-]++")
_ASSIGNED_VALUE = (
    r"""(?:(?:'[^'\n]*+'|"(?:[^"\\\n]|\\.)*+")(?:\\.|[^\s'"&;|<>\\])*+|(?:\\.|[^\s'"&;|<>\\])++)"""
)
_AFTER_EQUALS = re.compile(rf"=({_ASSIGNED_VALUE})")
_AFTER_BLANKS = re.compile(rf"[ \t]++({_ASSIGNED_VALUE})")
_AFTER_COLON = re.compile(r"""["']?[ \t]*+:(?!//|\d{1,5}(?:/|$))[ \t]*+["']?([^'"\n]++)""")
_AFTER_USER = re.compile(r"""[ \t=]*+["']?([^\s'":]{0,256}+:(?!//)[^\s'"]*+)""")
_USER_OPTION = re.compile(r"-[a-zA-Z]*[uU]|--(?:proxy-)?user|-[uU][\w-]+")


def redacted(value: str) -> str:
    """Return `value`, the URL of a shard, a command, a path or a word, with credentials replaced by `***`."""
    if command := _COMMAND.match(value):
        program = command[1] or ""
        rest = HIDDEN if value[command.end() :].strip() else ""
        return f"pipe:{' '.join(filter(None, (program, rest)))}"
    if user := _MISSPELT.match(value):
        value = user[1] + HIDDEN + value[user.end(2) :]
    return _without(value, [], _is_hidden)


def redacted_text(text: str, source: str = "") -> str:
    """Return `text` with its credentials replaced by `***`, and those of `source`, a URL or a command."""
    if source:
        text = text.replace(source, redacted(source))
    found: list[str] = []
    _without(source, found, _is_hidden)
    for credential in sorted({*found}, key=len, reverse=True):
        text = text.replace(credential, HIDDEN)
    return _named(_URL.sub(lambda url: url[1] + _body(url[2], found, _is_hidden), text), found)


def redacted_values(value: Any) -> Any:
    """Return a tree of lists and dictionaries with the credentials in texts and keys replaced by `***`."""
    match value:
        case str():
            return redacted(value)
        case list() | tuple():
            return [*map(redacted_values, value)]
        case dict():
            return {
                redacted(str(key)): HIDDEN
                if isinstance(item, str) and _SECRET.search(str(key))
                else redacted_values(item)
                for key, item in value.items()
            }
    return value


def canonical(url: str) -> str:
    """Return the URL or command without those parts that change when its credentials are renewed.

    These are the user with the password, and the values that are named like a credential. The result may
    contain other credentials and is not for display.
    """
    return _without(url, [], _is_renewed)


def _is_hidden(name: str, value: str) -> bool:
    return _is_renewed(name, value) or not _PLAIN_VALUE.fullmatch(value)


def _is_renewed(name: str, value: str) -> bool:
    return bool(_SECRET.search(name) or _SHORT_SECRET.search(name) or _SIGNED.fullmatch(name))


_Test = Callable[[str, str], bool]


def _without(value: str, found: list[str], is_hidden: _Test) -> str:
    """Return one URL or command without its credentials, which are added to `found`."""
    if start := _WHOLE_URL.match(value):
        # Quotes and blanks are part of this URL. fsspec joins URLs by two colons.
        first, *others = _CHAINED.split(value[start.end() :])
        return "::".join(
            [start[0] + _body(first, found, is_hidden)] + [_without(url, found, is_hidden) for url in others]
        )
    return _named(_URL.sub(lambda url: url[1] + _body(url[2], found, is_hidden), value), found)


def _body(body: str, found: list[str], is_hidden: _Test) -> str:
    """Return the part of a URL after `//` without its credentials."""

    def hide_parameter(match: re.Match[str]) -> str:
        start, name, value = match[1], match[2] or "", match[3]
        if value == HIDDEN or not is_hidden(name.rstrip("="), value):
            return match[0]
        return start + name + _hide(value, found)

    authority = re.split("[/?#]", body, maxsplit=1)[0]
    is_host = _HOST.fullmatch(authority) is not None
    end = -1
    if not is_host or ":" in authority:
        # A password may contain "/", and "?" and "#" if nothing else explains the colon.
        end = body.rfind("@", 0, len(re.split("[?#]", body, maxsplit=1)[0]))
        if end < 0 and not is_host:
            end = body.rfind("@") if "@" in body else len(authority)
    user = body[:end] if end >= 0 else ""
    shown = _hide(user, found) if user else ""
    return shown + _PARAMETER.sub(hide_parameter, body[len(user) :])


def _named(text: str, found: list[str]) -> str:
    """Return `text` without the values that are named like a credential, as in `--token x` and `KEY=x`."""
    parts: list[str] = []
    kept = at = 0
    before = ""
    while word := _WORD.search(text, at):
        name, at = word[0], word.end()
        if value := _value_of(name, before, text, at):
            parts += text[kept : value.start(1)], _hide(value[1], found)
            kept = at = value.end(1)
        before = name
    return "".join([*parts, text[kept:]])


def _value_of(name: str, before: str, text: str, at: int) -> re.Match[str] | None:
    """Return the match, from `at` on, of the value that the word `name` makes a credential."""
    is_secret = _SECRET.search(name) is not None
    if is_secret and (value := _AFTER_COLON.match(text, at)):
        return value
    if is_secret or _SHORT_SECRET.search(name):
        if value := _AFTER_EQUALS.match(text, at):
            return value
        if name.startswith("-"):
            return _AFTER_BLANKS.match(text, at)
    if name.lower() in ("bearer", "basic") or (before, name) == ("sshpass", "-p"):
        return _AFTER_BLANKS.match(text, at)
    return _AFTER_USER.match(text, at) if _USER_OPTION.fullmatch(name) else None


def _hide(credential: str, found: list[str]) -> str:
    """Add a credential to `found` in the forms that may be printed; return the text shown instead of it."""
    if len(credential) < _SHORTEST:
        return HIDDEN
    # The password of `user:password`, the token of `Bearer token`.
    parts = (
        credential,
        credential.partition(":")[2],
        credential.rpartition(":")[2],
        credential.split(" ")[-1],
    )
    for part in parts:
        forms = {part.strip("'\""), urllib.parse.unquote(part), re.sub(r"['\"\\]", "", part)}
        found.extend(form for form in forms if len(form) >= _SHORTEST and form.strip("*"))
    return HIDDEN
