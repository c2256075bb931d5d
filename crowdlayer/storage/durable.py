"""Files that a power loss leaves whole or not there: written beside, flushed to the disk, and then renamed.

What is renamed without a flush has a digest somewhere, by which its next reader finds out whether it is torn.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

BESIDE = re.compile(r"\.[^/]+\.[0-9a-f]{32}")
"""The names of files that are not whole yet."""


@contextmanager
def whole(target: Path) -> Iterator[io.BufferedRandom]:
    """A file to write and to read, which gets its name when it is whole and on the disk.

    Until then it lies beside as `.<name>.<random>`, locked: the next one for the same name removes what a killed
    process has left, and nothing that another still writes.

    Raises:
        OSError: as the disk says; nothing half-written is there then, under whatever name.
    """
    for left in _left(target):
        _remove(left)
    beside = target.with_name(f"{_hidden(target)}{uuid.uuid4().hex}")  # mkstemp's would not heed the umask
    try:
        with beside.open("x+b") as file:
            _lock(file)
            with suppress(OSError):  # a file that is replaced has been for those who may read it
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # of disks that flush files alone
            raise
    finally:
        os.close(descriptor)


def flush_disk(folder: Path) -> None:
    """Have all that was written to the disk of `folder` on it; of many files far quicker than one by one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(descriptor)


def _hidden(target: Path) -> str:
    """How the names beside begin, for no two targets alike; with the rest they have less than a name's 255 bytes."""
    name = target.name
    if len(name) > 50:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}."


def _left(target: Path) -> list[Path]:
    beside = re.compile(re.escape(_hidden(target)) + "[0-9a-f]{32}")
    with os.scandir(target.parent) as entries:
        return [Path(entry.path) for entry in entries if beside.fullmatch(entry.name)]


def _lock(file: IO[bytes]) -> bool:
    """Whether the file is this process's alone from now until it is closed; never where the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(left: Path) -> None:
    try:
        with left.open("r+b") as file:
            if _lock(file):
                left.unlink(missing_ok=True)
    except (FileNotFoundError, PermissionError):
        pass  # it has its name by now; or is another user's
