"""Removal of credentials from URLs and shell commands, for messages, records and saved configurations.

    https://user:password@host/a.tar?part=7&sig=x      ->  https://***@host/a.tar?part=7&sig=***
    pipe:curl -H 'Authorization: Bearer x' -u a:b URL  ->  pipe:curl -H 'Authorization: ***' -u *** URL

Values of a URL's query are removed unless they are numbers or names of shards. A credential in the path of a
URL, or in an option of a command that no pattern below describes, is not recognised.
"""

from __future__ import annotations

import re
import urllib.parse

HIDDEN = "***"
# Shorter credentials are not searched for in other texts, because they occur in ordinary words.
_SHORTEST = 4

_NAME = (
    r"[\w-]*(?:authori[sz]ation|bearer|cookie|credential|passphrase|passw|pwd|secret|signature|token|x-auth|"
    r"(?:access|account|api|auth|private)[_-]?key)[\w-]*"
)
_VALUE = r"""(?:'[^'\n]*'|"[^"\n]*"|[^\s'"&;|<>]+)"""
_USERINFO = re.compile(r"(?<![\w+.-])([a-zA-Z][\w+.-]*://)([^\s/?#]+)(?=@)")
_URL = re.compile(r"""(?<![\w+.-])[a-zA-Z][\w+.-]*://[^\s'"<>|`]+""")
_PARAMETER = re.compile(r"([?&;#])([^?&;#=]*=)?([^?&;#]+)")
_PLAIN_VALUE = re.compile(r"\d{1,9}|\{\d{1,9}\.\.\d{1,9}\}|[\w./{},%-]*\.tar")
_SECRET_NAME = re.compile(rf"(?i){_NAME}|(?:.*[_-])?(?:auth|code|jwt|key|otp|pass|pin|pw|sas|sig)")
# The first group of a pattern is the text before a credential, the second the credential.
_IN_COMMANDS = [
    re.compile(pattern)
    for pattern in (
        rf"(?i)(?<![\w-])({_NAME}[\"']?[ \t]*:(?!//|\d{{1,5}}(?:/|$))[ \t]*[\"']?)([^'\"\n]+)",
        rf"(?i)(?<![\w-])({_NAME}=)({_VALUE})",
        rf"(?i)(?<![\w-])(-{_NAME}[ \t]+)({_VALUE})",
        r"(?i)(?<![\w-])((?:bearer|basic)[ \t]+)([^\s'\"]+)",
        r"(?<![\w-])((?:-[uU][ \t]*|--(?:proxy-)?user[ =][ \t]*)[\"']?)([^\s'\"]+:(?!//)[^\s'\"]*)",
        rf"(?<![\w-])(sshpass[ \t]+-p[ \t]*)({_VALUE})",
    )
]


def redacted(text: str, source: str = "") -> str:
    """Return `text` with its credentials replaced by `***`, and those of `source`, a URL or a command."""
    found: list[str] = []
    _redact(source, found)
    for credential in sorted({*found}, key=len, reverse=True):
        text = text.replace(credential, HIDDEN)
    return _redact(text, found)


def _redact(text: str, found: list[str]) -> str:
    """Return `text` without its credentials, which are added to `found` in the forms that may be printed."""

    def hide(before: str, credential: str) -> str:
        # The password of `user:password`, the token of `Bearer token`.
        for part in (credential, credential.rpartition(":")[2], credential.split()[-1]):
            forms = {part.strip("'\""), urllib.parse.unquote(part)}
            found.extend(form for form in forms if len(form) >= _SHORTEST and form.strip("*"))
        return before + HIDDEN

    def hide_parameter(match: re.Match[str]) -> str:
        start, name, value = match[1], match[2] or "", match[3]
        if _PLAIN_VALUE.fullmatch(value) and not _SECRET_NAME.fullmatch(name.rstrip("=")):
            return match[0]
        return hide(start + name, value)

    text = _USERINFO.sub(lambda match: hide(match[1], match[2]), text)
    text = _URL.sub(lambda match: _PARAMETER.sub(hide_parameter, match[0]), text)
    for pattern in _IN_COMMANDS:
        text = pattern.sub(lambda match: hide(match[1], match[2]), text)
    return text
