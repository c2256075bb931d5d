"""What no log may show: the secrets of URLs, as errors of other libraries and names of the data have them.

In time that is linear in the text: who writes names of a million characters must not keep a job from ending.
"""

from __future__ import annotations

import re

WORD = re.compile(r"[^\s'\"]+")
SIGNED = re.compile(r"[^?&]*+[?&].*(?:Signature|Credential|Token)=", re.DOTALL)
"""A URL whose query grants what its signature does."""
QUERY = re.compile(r"(?<=[?&]).+", re.DOTALL)
LAST_AT = re.compile(r".*(?=@[\w\[])", re.DOTALL)
"""What is before the @ of a host."""
BEGIN = r"(?<![^:@])[^:@=(,]*+[=(,]"
PASSWORD = re.compile(rf"({BEGIN})[^:@]++:.+", re.DOTALL)
PASSWORD_FIRST = re.compile(rf"(\A|{BEGIN})[^:@]++:.+", re.DOTALL)
"""A user and a password: after what may stand before a URL; where one begins."""


def without_secrets(text: str) -> str:
    """`text` without users and passwords of URLs, of those without a scheme too, and the queries of signed ones."""
    return WORD.sub(lambda word: _masked(word[0]), text)


def _masked(word: str) -> str:
    masked = _without_users(word) if "@" in word else word
    return QUERY.sub("***", masked, count=1) if SIGNED.match(word) else masked


def _without_users(word: str) -> str:
    parts = word.split("/")
    for n, part in enumerate(parts):
        begins = n == 0 or (n >= 2 and not parts[n - 1])
        user, at, host = part.rpartition("@")
        if n >= 2 and begins and parts[n - 2].endswith(":") and user:
            parts[n] = f"***@{host}"
        elif at and (before := LAST_AT.match(part)) is not None:
            hidden = (PASSWORD_FIRST if begins else PASSWORD).sub(r"\1***", before[0], count=1)
            parts[n] = hidden + part[before.end() :]
    return "/".join(parts)
