"""What S3's ETag tells of an object's bytes: their MD5; or the MD5 of its parts' MD5s, where it was put in parts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from .files import CHUNK, Stored

PART = 64 * 2**20
"""Bytes per part of an upload; a constant, so that the ETag of a multi-part upload can be foretold."""
ETAG = re.compile('"?(?P<md5>[0-9a-f]{32})(?:-(?P<parts>[0-9]+))?"?')
"""Of an object put at once, and of one put in parts."""
PART_SIZES = tuple(n * 2**20 for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1024))
"""Bytes per part that the usual tools upload with; an ETag does not tell them."""


class EtagCheck:
    """Whether bytes, told as they come, have the MD5, or the parts' MD5s, that an ETag is made of.

    `first_part`: the size of the object's first part, where it is known.
    """

    def __init__(self, stored: Stored, first_part: int | None = None) -> None:
        form = ETAG.fullmatch(stored.etag)
        self._etag = None if form is None else stored.etag.strip('"')
        self._possible: list[_Whole | _Parts] = []
        if form is not None and form["parts"] is None:
            self._possible = [_Whole()]
        elif form is not None:
            sizes = (first_part,) if first_part else (*PART_SIZES, stored.size)
            fitting = {size for size in sizes if size and -(-stored.size // size) == int(form["parts"])}
            self._possible = [_Parts(size) for size in sorted(fitting)]

    def update(self, chunk: bytes | memoryview) -> None:
        for etag in self._possible:
            etag.update(chunk)

    def fits(self) -> bool | None:
        """None where the ETag is made of no MD5."""
        return None if self._etag is None else self._etag in [etag.etag() for etag in self._possible]


def expected_etag(source: Path) -> str:
    """S3's ETag of an upload of ours: the MD5, or that of parts of `PART` bytes."""
    etag = _Whole() if source.stat().st_size < PART else _Parts(PART)
    with source.open("rb") as file:
        while chunk := file.read(CHUNK):
            etag.update(chunk)
    return etag.etag()


def md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


class _Whole:
    """The ETag of an upload at once."""

    def __init__(self) -> None:
        self._md5 = md5()

    def update(self, chunk: bytes | memoryview) -> None:
        self._md5.update(chunk)

    def etag(self) -> str:
        return self._md5.hexdigest()


class _Parts:
    """The ETag of an upload by parts of `size` bytes: the MD5 of the parts' MD5s, and their number."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._part, self._parts, self._count = md5(), md5(), 0

    def update(self, chunk: bytes | memoryview) -> None:
        rest = memoryview(chunk)
        while rest:
            some, rest = rest[: self._left], rest[self._left :]
            self._part.update(some)
            self._left -= len(some)
            if not self._left:
                self._close()

    def _close(self) -> None:
        self._parts.update(self._part.digest())
        self._count += 1
        self._part, self._left = md5(), self._size

    def etag(self) -> str:
        """To be asked at the end."""
        if self._left < self._size:
            self._close()
        return f"{self._parts.hexdigest()}-{self._count}"
