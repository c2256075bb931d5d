"""The files of a tar or zip → files on this machine, and nowhere but where they belong."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import DataError, one_line
from .files import CHUNK, enough_space, safe_names

BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError,
    NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip
"""What the libraries raise for archives that are damaged, encrypted or packed in ways that they do not know."""
ALWAYS, RATIO = 2**30, 100
"""An archive may unpack to so many bytes, or to so many times its own: images hardly shrink, bombs do by a thousand."""
HEADER = 16 * 2**20
"""Bytes of a tar that are ever asked for at once; a header that claims more would come whole into the memory."""


@dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(path: Path, location: str, root: Path, belongs: Callable[[str], bool]) -> dict[str, str]:
    """Write the archive's files that belong to the data set below `root`; returns their SHA-256 by name.

    Raises:
        DataError: the archive of `location` is damaged, or has a name that must not become a file.
    """
    at_most = max(ALWAYS, RATIO * path.stat().st_size)
    try:
        with _opened(path, at_most) as members:
            if sum(member.size for member in members) > at_most:
                raise DataError(f"{location}: must not unpack to more than {at_most / 1e9:.1f} GB, declares more")
            return _write(_top_stripped(members), root, belongs)
    except (*BROKEN, OSError) as error:
        if not isinstance(error, BROKEN) and error.errno != errno.EINVAL:  # an offset that cannot be
            raise
        raise DataError(f"{location}: must be a whole archive: {one_line(str(error))}") from error


class _Bounded(io.RawIOBase):
    """A tar's bytes, of which nobody reads too many: neither at once nor in all."""

    def __init__(self, stream: IO[bytes], at_most: int) -> None:
        self._stream = stream
        self._at_most = at_most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER:
            raise tarfile.ReadError("a header claims an impossible size")
        self._within(self._stream.tell())
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._within(offset)
        return self._stream.seek(offset, whence)

    def _within(self, position: int) -> None:
        if position > self._at_most:
            raise tarfile.ReadError(f"it must not unpack to more than {self._at_most / 1e9:.1f} GB, goes on beyond")

    def tell(self) -> int:
        return self._stream.tell()


@contextmanager
def _opened(path: Path, at_most: int) -> Iterator[list[Member]]:
    """The regular files of a tar or zip; folders, links and devices are not among them."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            yield [
                Member(info.filename, info.file_size, lambda info=info: archive.open(info))  # type: ignore[misc]
                for info in archive.infolist()
                if not info.filename.endswith("/") and not stat.S_ISLNK(info.external_attr >> 16)
            ]
        return
    with _decompressed(path) as stream, tarfile.open(fileobj=_Bounded(stream, at_most), mode="r:") as tar:

        def reader(info: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
            def opened() -> IO[bytes]:
                file = tar.extractfile(info)
                assert file is not None  # a regular file has content
                return file

            return opened

        members, at = [], -1
        for info in tar:
            if info.size < 0 or tar.offset <= at:  # Pythons before 3.11.14 and 3.12.12 go round in circles
                raise tarfile.ReadError("a header claims an impossible size")
            at = tar.offset
            if info.isreg():
                members.append(Member(info.name, info.size, reader(info)))
        _to_the_end(tar)
        yield members


def _decompressed(path: Path) -> IO[bytes]:
    """The tar itself, whatever it is packed in and named."""
    with path.open("rb") as file:
        start = file.read(6)
    packed = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    opener = next((opener for magic, opener in packed.items() if start.startswith(magic)), open)
    return opener(path, "rb")  # type: ignore[operator, no-any-return]


def _to_the_end(tar: tarfile.TarFile) -> None:
    """Refuse a tar that breaks off: tarfile takes a header that is damaged or not there for the end.

    Reading on to the last byte lets gzip compare its checksum.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it breaks off or a header is damaged")
    while tar.fileobj.read(CHUNK):
        pass


def _top_stripped(members: list[Member]) -> list[Member]:
    """The members relative to the data set's folder: the archive's root, or the one folder in it that has train/."""
    members = [Member(m.name.removeprefix("./"), m.size, m.open) for m in members]
    if any(m.name.startswith("train/") for m in members):
        return members
    tops = {m.name.split("/")[0] for m in members if m.name.split("/")[1:2] == ["train"]}
    if len(tops) != 1:
        return members
    top = tops.pop() + "/"
    return [Member(m.name.removeprefix(top), m.size, m.open) for m in members if m.name.startswith(top)]


def _write(members: list[Member], root: Path, belongs: Callable[[str], bool]) -> dict[str, str]:
    safe_names([member.name for member in members])
    wanted = [member for member in members if belongs(member.name)]
    twice = sorted(name for name, n in Counter(member.name for member in wanted).items() if n > 1)
    if twice:
        raise DataError(*(f"{one_line(name)!r}: must be in the archive once" for name in twice))
    root.mkdir(parents=True, exist_ok=True)
    enough_space(root, sum(member.size for member in wanted))
    digests = {}
    for member in wanted:
        target = root / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, left = hashlib.sha256(), member.size
        with member.open() as packed, target.open("wb") as file:
            while chunk := packed.read(min(CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                file.write(chunk)
        if left:
            has = "more" if left < 0 else str(member.size - left)
            raise DataError(f"{one_line(member.name)!r}: must have the {member.size} bytes it declares, has {has}")
        digests[member.name] = digest.hexdigest()
    return digests
