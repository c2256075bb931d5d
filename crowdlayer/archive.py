"""The files of a tar or zip → files on this machine, and nowhere but where they belong."""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
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

from .errors import DataError, one_line
from .files import CHUNK, enough_space, safe_names

BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError,
    NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip
"""What the libraries raise for archives that are damaged, encrypted or packed in ways that they do not know."""


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
    try:
        with _opened(path) as members:
            return _write(_top_stripped(members), root, belongs)
    except (*BROKEN, OSError) as error:
        if not isinstance(error, BROKEN) and error.errno != errno.EINVAL:  # an offset that cannot be
            raise
        raise DataError(f"{location}: must be a whole archive: {one_line(str(error))}") from error


@contextmanager
def _opened(path: Path) -> Iterator[list[Member]]:
    """The regular files of a tar or zip; folders, links and devices are not among them."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            yield [
                Member(info.filename, info.file_size, lambda info=info: archive.open(info))  # type: ignore[misc]
                for info in archive.infolist()
                if not info.filename.endswith("/") and not stat.S_ISLNK(info.external_attr >> 16)
            ]
        return
    with tarfile.open(path) as tar:

        def reader(info: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
            def opened() -> IO[bytes]:
                file = tar.extractfile(info)
                assert file is not None  # a regular file has content
                return file

            return opened

        members = [Member(info.name, info.size, reader(info)) for info in tar if info.isreg()]
        _to_the_end(tar)
        yield members


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
