"""The job's folder on this machine: what is ours in it, and how a file comes to be there, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import SettingsError, StoreError
from .files import Stored, disk_errors
from .places import Place

OURS = (
    "archive", "archive.json", "cache", "data", "dry-run", "files", "manifest.jsonl", "partial",
    "predict", "predictions.csv", "predictions.parquet", "run",
)  # fmt: skip
"""What jobs make, replace and remove in a WORKDIR."""
NODE = re.compile(r"^node-\d+/")
"""What the folder of a node in WORKDIR is called."""
BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def working_folder(named: str | None) -> Iterator[Path]:
    """WORKDIR, locked for this job alone; or a fresh folder that is gone afterwards.

    Raises:
        SettingsError: it is a file, or has something of another's under a name that is removed from it.
        StoreError: another job has it.
    """
    if named is None:
        with _fresh_folder() as fresh:
            yield fresh
        return
    path = Path(named)
    with disk_errors(f"WORKDIR {named}"):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise SettingsError(f"WORKDIR: must be a folder, a file is in its place: {named}") from error
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(f"WORKDIR: must be this job's alone, another job is using {named}") from error
    try:
        with disk_errors(f"WORKDIR {named}"):
            _claim(path)
        yield path
    finally:
        lock.release()


@contextmanager
def _fresh_folder() -> Iterator[Path]:
    """A folder below TMPDIR, gone afterwards; gone are also those of jobs that were killed, since this machine is up.

    A folder is locked before it has its name: who finds it unlocked under this name may remove it. The name has the
    machine in it: others that see the same TMPDIR may not see its locks.
    """
    above, prefix = Path(tempfile.gettempdir()), f"crowdlayer-{_machine()}-"
    with disk_errors("TMPDIR, for want of a WORKDIR"):
        for left in above.glob(f"{prefix}*"):
            with suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=above))
    with ExitStack() as lock:
        with suppress(OSError):  # of a disk that knows no locks: then nobody removes it
            lock.enter_context(_locked(beside))
        with disk_errors(str(beside)):
            fresh = beside.rename(above / beside.name.removeprefix("."))
        try:
            yield fresh
        finally:
            for _ in range(10):  # a download that is not waited for may be making a file meanwhile
                shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder; an OSError where another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _machine() -> str:
    """A name of this machine since it was started, the same in all of its containers; of no other where it has none."""
    with suppress(OSError):
        return BOOT.read_text()[:8]
    return uuid.uuid4().hex[:8]


def is_ours(name: str) -> bool:
    """Whether what has this name, relative to WORKDIR, is removed with what jobs make there."""
    return NODE.sub("", name, count=1).partition("/")[0] in OURS


def _claim(workdir: Path) -> None:
    """Mark the folder as ours; all that is removed later has names that were free then."""
    mark = workdir / ".crowdlayer"
    if mark.exists():
        return
    taken = [name for name in OURS if (workdir / name).exists()]
    if taken:
        raise SettingsError(f"WORKDIR: must be a folder for this job alone, {workdir} has {taken[0]} of another's")
    mark.touch()


def tidy(workdir: Path) -> None:
    """Remove what a killed sync left half done."""
    workdir.mkdir(parents=True, exist_ok=True)
    for folder in ("partial", "archive"):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def remove(root: Path, name: str) -> None:
    """Remove a file and the folders that are empty without it: a file may come to be where they are."""
    (root / name).unlink(missing_ok=True)
    while name := name.rpartition("/")[0]:
        try:
            (root / name).rmdir()
        except OSError:
            return


def bring(source: Place, stored: Stored, target: Path, workdir: Path) -> str:
    """Into a nameless neighbour first: what bears the name is whole."""
    partial = workdir / "partial"
    partial.mkdir(exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=partial)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            digest = source.download(stored, file)
        _make_folder(target.parent, workdir)
        Path(beside).replace(target)
    finally:
        Path(beside).unlink(missing_ok=True)
    return digest


def _make_folder(folder: Path, workdir: Path) -> None:
    """Make it and those above it, but for WORKDIR, which is gone when the job has ended meanwhile."""
    if folder != workdir and not folder.is_dir():
        _make_folder(folder.parent, workdir)
        folder.mkdir(exist_ok=True)
