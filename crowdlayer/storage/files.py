"""What files on this machine ask for: names that stay inside, room on the disk, digests, one line per error."""

from __future__ import annotations

import codecs
import errno
import hashlib
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ..errors import AccessError, DataError, DeviceMemoryError, StoreError, one_line, short

T = TypeVar("T")

CHUNK = 2**20
"""Bytes read at once."""
LONGEST_NAME = 1024
"""Bytes, as in S3; a path has room for four times as many."""
SPARE = 64 * 2**20
"""Bytes that a sync leaves free on the disk."""


@dataclass(frozen=True)
class Stored:
    """A file of a place: its name relative to the place, its size in bytes, and its version there."""

    name: str
    size: int
    etag: str


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def may_be_open() -> int:
    """How many more files and connections this process may have open at once."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if most == resource.RLIM_INFINITY else most - len(list(Path("/dev/fd").iterdir()))


def decode_json(text: bytes, form: type[T]) -> T:
    """JSON as a `form`; a byte-order mark, which other systems put first, is none of its text.

    Raises:
        ValueError: no JSON, or of another form.
    """
    try:
        return msgspec.json.decode(text.removeprefix(codecs.BOM_UTF8), type=form)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is in UTF-16, must be in UTF-8") from error
        raise ValueError(one_line(str(error))) from error


def size_of(path: Path) -> int | None:
    """The size of a file in bytes, None where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def enough_space(folder: Path, need: int) -> None:
    """Check that the disk of `folder` has room for `need` bytes more.

    Raises:
        StoreError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if need and need + SPARE > free:
        raise StoreError(f"{folder}: {(need + SPARE) / 1e6:.0f} MB of disk are needed, {free / 1e6:.0f} MB are free")


@contextmanager
def disk_errors(thing: str) -> Iterator[None]:
    """Turn what the operating system says into one line and the right exit code."""
    try:
        yield
    except PermissionError as error:
        raise AccessError(f"{thing}: must be accessible: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EROFS:  # no retry makes it writable
            raise AccessError(f"{thing}: must be writable: {error.strerror}") from error
        if error.errno == errno.ENOMEM:  # for a file that is mapped, as under `ulimit -v`
            raise DeviceMemoryError(f"out of memory: {thing}: {error.strerror}") from error
        raise StoreError(f"{thing}: {error.strerror or one_line(str(error))}") from error


def safe_names(names: Sequence[str]) -> None:
    """Refuse names that could leave the folder they are written to, or that cannot all be files.

    Raises:
        DataError: naming each with its reason.
    """
    unsafe = {name: reason for name in names if (reason := _unsafe(name)) is not None}
    complaints = [f"{short(name, 300)!r}: {reason}" for name, reason in unsafe.items()]
    folders: set[str] = set()
    for name in names:
        while name not in unsafe and (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    complaints += [
        f"{short(name, 300)!r}: must be a file or a folder, is both" for name in sorted(folders.intersection(names))
    ]
    if complaints:
        raise DataError(*complaints)


def can_be_named(name: str) -> bool:
    """Whether a file may have this name, relative to a folder: what a list of files says may be anything."""
    try:
        return _unsafe(name) is None
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _unsafe(name: str) -> str | None:
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "a name must be relative"
    if "\\" in name:
        return "a name must have no backslash"
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "a name must have no control character"
    if any(part in ("", ".", "..") for part in parts):
        return "a name must have no empty part, '.' or '..'"
    if len(name.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        return f"a name must have at most {LONGEST_NAME} bytes"
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        return "a part of a name must have at most 255 bytes"
    return None
