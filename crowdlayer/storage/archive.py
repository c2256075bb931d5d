"""The files of a tar or zip → files on this machine, and nowhere but where they belong."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import logging
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from ..errors import DataError, one_line, short
from .files import CHUNK, enough_space, safe_names

log = logging.getLogger(__name__)

BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError,
    NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip
"""What the libraries raise for archives that are damaged, encrypted or packed in ways that they do not know."""
ALWAYS, RATIO = 2**30, 100
"""An archive may unpack to so many bytes, or to so many times its own: images hardly shrink, bombs do by a thousand."""
UTF_8 = 0x800
"""The flag of a zip's name that says what it is in."""
HEADER = 16 * 2**20
"""Bytes of a tar that are ever asked for at once; a header that claims more would come whole into the memory."""


@dataclass(frozen=True)
class Member:
    """A file in an archive, to be opened before the next one is asked for; a link cannot be."""

    name: str
    size: int
    open: Callable[[], IO[bytes]] | None


@dataclass(frozen=True)
class Unpacked:
    """A member that has been met; `file` holds it where it may belong to the data set."""

    name: str
    file: Path | None
    sha256: str


def must_be_whole(name: str) -> bool:
    """Whether an archive of that name can only be unpacked when all of it is there: a zip's directory is its end."""
    return name.lower().endswith(".zip")


def unpack(
    stream: io.BufferedReader, size: int, location: str, beside: Path, belongs: Callable[[str], bool], stripped: bool
) -> list[Unpacked]:
    """The archive's files that belong to the data set, numbered in the folder `beside`, which is emptied first.

    A tar is read once, from its start to its end. No name of an archive's becomes a path before all of them have been
    checked, so their files have numbers until `put_in_place`.

    Args:
        size: bytes of the archive.
        stripped: find the data set's folder in it, to which names are relative then.

    Raises:
        DataError: the archive of `location` is damaged, or has a name that must not become a file.
    """
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    at_most = max(ALWAYS, RATIO * size)
    members = _zipped(stream) if must_be_whole(location) else _tarred(stream, at_most)
    try:
        with closing(members):
            unpacked = _unpacked(members, location, at_most, beside, belongs)
    except (*BROKEN, OSError) as error:
        # bz2's word has no number; an offset that cannot be is EINVAL
        if not isinstance(error, BROKEN) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{location}: must be a whole archive: {one_line(str(error))}") from error
    if stripped:
        unpacked = _top_stripped(unpacked)
    safe_names([member.name for member in unpacked])
    wanted = [member for member in unpacked if belongs(member.name)]
    twice = sorted(name for name, n in Counter(member.name for member in wanted).items() if n > 1)
    if twice:
        raise DataError(*(f"{short(name, 300)!r}: must be in the archive once" for name in twice))
    return wanted


def put_in_place(files: list[Unpacked], root: Path) -> dict[str, str]:
    """Give the files their names below `root`, on the same disk; returns their SHA-256 by name."""
    root.mkdir(parents=True, exist_ok=True)
    for member in files:
        assert member.file is not None  # what belongs now could belong before
        target = root / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        member.file.replace(target)
    return {member.name: member.sha256 for member in files}


# --- what is in an archive -------------------------------------------------------------------------------------------
# Its regular files and links, in their order; folders and devices are not among them.


def _zipped(stream: io.BufferedReader) -> Generator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if stat.S_ISLNK(info.external_attr >> 16):
                yield Member(_decoded(info), 0, None)
            elif not info.filename.endswith("/"):
                yield Member(_decoded(info), info.file_size, partial(archive.open, info))


def _decoded(info: zipfile.ZipInfo) -> str:
    """The name: Info-ZIP's zip writes UTF-8 and does not say so, which zipfile then takes for the code page of DOS."""
    if info.flag_bits & UTF_8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _tarred(stream: io.BufferedReader, at_most: int) -> Generator[Member]:
    with tarfile.open(fileobj=_Forward(_decompressed(stream), at_most), mode="r:") as tar:
        at = -1
        for info in tar:
            if info.size < 0 or tar.offset <= at:  # Pythons before 3.11.14 and 3.12.12 go round in circles
                raise tarfile.ReadError("a header claims an impossible size")
            at = tar.offset
            if info.isreg():
                yield Member(info.name, info.size, partial(_opened, tar, info))
            elif info.islnk() or info.issym():
                yield Member(info.name, 0, None)
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        _to_the_end(tar)


def _opened(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None  # a regular file has content
    return file


def _decompressed(stream: io.BufferedReader) -> IO[bytes]:
    """The tar itself, whatever it is packed in and named."""
    start = stream.peek(6)
    packed = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    opener = next((opener for magic, opener in packed.items() if start.startswith(magic)), None)
    return stream if opener is None else opener(stream)  # type: ignore[operator]


class _Forward(io.RawIOBase):
    """A tar's bytes from a stream: not too many, neither at once nor in all, and back by no more than a block."""

    def __init__(self, stream: IO[bytes], at_most: int) -> None:
        self._stream = stream
        self._at_most = at_most
        self._at = 0
        self._came = 0
        """Bytes that the stream has given."""
        self._last = b""
        """The last block of them."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER:
            raise tarfile.ReadError("a header claims an impossible size")
        back = self._came - self._at
        known = self._last[len(self._last) - back :][:size] if back else b""
        fresh = self._next(size - len(known))
        self._at += len(known) + len(fresh)
        return known + fresh

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        while self._came < offset and self._next(min(CHUNK, offset - self._came)):
            pass
        if not self._came - len(self._last) <= offset:
            raise tarfile.ReadError("a header claims an impossible offset")
        self._at = min(offset, self._came)
        return self._at

    def tell(self) -> int:
        return self._at

    def _next(self, size: int) -> bytes:
        if self._came > self._at_most:
            raise tarfile.ReadError(f"it must not unpack to more than {self._at_most / 1e9:.1f} GB, goes on beyond")
        chunk = self._stream.read(size)
        self._came += len(chunk)
        self._last = (self._last + chunk[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return chunk


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


# --- what becomes of it ----------------------------------------------------------------------------------------------


def _unpacked(
    members: Generator[Member], location: str, at_most: int, beside: Path, belongs: Callable[[str], bool]
) -> list[Unpacked]:
    """The members, those files among them that may belong to the data set: the folder above it is not known yet."""
    unpacked, total, links = [], 0, 0
    for number, member in enumerate(members):
        total += member.size
        if total > at_most:
            raise DataError(f"{location}: must not unpack to more than {at_most / 1e9:.1f} GB, declares more")
        name = member.name.removeprefix("./")
        may_belong = belongs(name) or belongs(name.partition("/")[2])
        if member.open is None:
            links += may_belong
            continue
        file = beside / str(number) if may_belong else None
        unpacked.append(Unpacked(name, file, "" if file is None else _written(member, member.open, file)))
    if links:
        log.warning("%s: %d links are left out; tar --dereference --hard-dereference puts the files there themselves",
                    location, links)  # fmt: skip
    return unpacked


def _written(member: Member, opened: Callable[[], IO[bytes]], file: Path) -> str:
    """Write a member to `file`; returns its SHA-256."""
    enough_space(file.parent, member.size)
    digest, left = hashlib.sha256(), member.size
    with opened() as packed, file.open("wb") as target:
        while chunk := packed.read(min(CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            target.write(chunk)
    if left:
        has = "more" if left < 0 else str(member.size - left)
        raise DataError(f"{short(member.name, 300)!r}: must have the {member.size} bytes it declares, has {has}")
    return digest.hexdigest()


def _top_stripped(members: list[Unpacked]) -> list[Unpacked]:
    """The members relative to the data set's folder: the archive's root, or the one folder in it that has train/."""
    if any(m.name.startswith("train/") for m in members):
        return members
    tops = {m.name.split("/")[0] for m in members if m.name.split("/")[1:2] == ["train"]}
    if len(tops) != 1:
        return members
    top = tops.pop() + "/"
    return [replace(m, name=m.name.removeprefix(top)) for m in members if m.name.startswith(top)]
