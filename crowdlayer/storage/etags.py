"""What S3's ETag tells of an object's bytes: their MD5; or the MD5 of its parts' MD5s, where it was put in parts."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from .files import CHUNK, Stored

PART = 64 * 2**20
"""Bytes per part of an upload; a constant, so that the ETag of a multi-part upload can be foretold."""
ETAG = re.compile('"?(?P<md5>[0-9a-f]{32})(?:-(?P<parts>[0-9]+))?"?')
"""Of an object put at once, and of one put in parts."""
PART_SIZES = tuple(n * 2**20 for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1024))
"""Bytes per part that the usual tools upload with; an ETag does not tell them."""


def fits(stored: Stored, file: IO[bytes], first_part: Iterable[int]) -> bool | None:
    """Whether `file` has the MD5, or the parts' MD5s, that its ETag is made of; None where it is made of none.

    `first_part`: the size of the object's first part, where it is known; asked only when the usual ones do not fit.
    """
    form = ETAG.fullmatch(stored.etag)
    if form is None:
        return None
    if form["parts"] is None:
        return hashed(file, _md5()).hexdigest() == form["md5"]
    etag, count = stored.etag.strip('"'), int(form["parts"])
    sizes = [size for size in (*PART_SIZES, stored.size) if size and -(-stored.size // size) == count]
    return any(_etag_of_parts(file, size) == etag for size in itertools.chain(sizes, first_part))


def expected_etag(source: Path) -> str:
    """S3's ETag of an upload of ours: the MD5, or that of parts of `PART` bytes."""
    with source.open("rb") as file:
        if source.stat().st_size < PART:
            return hashed(file, _md5()).hexdigest()
        return _etag_of_parts(file, PART)


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def hashed(file: IO[bytes], digest: hashlib._Hash) -> hashlib._Hash:
    """`digest`, updated with all of `file`."""
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest


def _etag_of_parts(file: IO[bytes], size: int) -> str:
    """S3's ETag of an upload by parts of `size` bytes: the MD5 of the parts' MD5s, and their number."""
    file.seek(0)
    parts = []
    left, part = size, _md5()
    while chunk := file.read(min(CHUNK, left)):
        part.update(chunk)
        left -= len(chunk)
        if not left:
            parts.append(part.digest())
            left, part = size, _md5()
    if left < size:
        parts.append(part.digest())
    joined = _md5()
    joined.update(b"".join(parts))
    return f"{joined.hexdigest()}-{len(parts)}"
