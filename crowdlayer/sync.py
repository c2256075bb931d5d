"""A data set at any place → files on this machine, each with its SHA-256."""

from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import DataError, SettingsError, StoreError, listed, one_line
from .settings import is_archive
from .storage import CHUNK, THREADS, Place, Stored, disk_errors, file_digest, place

log = logging.getLogger(__name__)

SPARE = 64 * 2**20
"""Bytes that a sync leaves free on the disk."""


@dataclass(frozen=True)
class Synced:
    """The files below `root`: their relative names, each with its SHA-256."""

    root: Path
    digests: dict[str, str]

    def digest(self) -> str:
        """One SHA-256 for all: the same for a folder, a bucket and an archive with the same tree."""
        return digest_of(self.digests)


def digest_of(digests: dict[str, str]) -> str:
    """The SHA-256 of `sha256  name` lines in the order of the names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def sync(location: str, workdir: Path, belongs: Callable[[str], bool]) -> Synced:
    """Bring the files that belong to the data set to this machine.

    A folder is read in place. A bucket comes into workdir/data, only what is new or changed by size and ETag; an
    archive is unpacked there, unless the very same one was.

    Raises:
        DataError: names that must not become files, an archive that cannot be read, nothing there at all.
        SettingsError, AccessError, StoreError: as the place says.
    """
    if is_archive(location):
        synced = _sync_archive(location, workdir, belongs)
    elif location.startswith("s3://"):
        synced = _sync_bucket(place(location), workdir, belongs)
    else:
        folder = place(location)
        names = [stored.name for stored in folder.listing() if belongs(stored.name)]
        root = Path(location)

        def digest(name: str) -> str:
            with disk_errors(f"{location}/{name}"):
                return file_digest(root / name)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            synced = Synced(root, dict(zip(names, pool.map(digest, names), strict=True)))
    if not synced.digests:
        raise DataError(f"{location}: must hold train/ and answers.json, holds no file of a data set")
    return synced


def fetch(location: str, workdir: Path, setting: str) -> tuple[Path, str]:
    """One file that a setting names, on this machine: its path and SHA-256.

    Raises:
        SettingsError: no such file.
    """
    folder, _, name = location.rpartition("/")
    if not location.startswith("s3://"):
        path = Path(location)
        with disk_errors(location):
            if not path.is_file():
                raise SettingsError(f"{setting}: must be a file, there is none at {location}")
            return path, file_digest(path)
    source = place(folder)
    stored = source.find(name) if name and folder != "s3:/" else None
    if stored is None:
        raise SettingsError(f"{setting}: must be an object, there is none at {location}")
    safe_names([name])
    target = workdir / "files" / setting.lower() / name
    with disk_errors(str(workdir)):
        _claim(workdir)
        _enough_space(workdir, stored.size)
        return target, _download(source, stored, target, workdir)


# --- names -----------------------------------------------------------------------------------------------------------


def safe_names(names: Sequence[str]) -> None:
    """Refuse names that could leave the folder they are written to, or that cannot all be files.

    Raises:
        DataError: naming each with its reason.
    """
    complaints = [f"{one_line(name)!r}: {reason}" for name in names if (reason := _unsafe(name)) is not None]
    folders: set[str] = set()
    for name in names:
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    complaints += [
        f"{one_line(name)!r}: must be a file or a folder, is both" for name in sorted(folders.intersection(names))
    ]
    if complaints:
        raise DataError(listed(complaints))


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
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        return "a part of a name must have at most 255 bytes"
    return None


# --- buckets ---------------------------------------------------------------------------------------------------------


def _sync_bucket(source: Place, workdir: Path, belongs: Callable[[str], bool]) -> Synced:
    listing = source.listing()
    safe_names([stored.name for stored in listing])
    wanted = {stored.name: stored for stored in listing if belongs(stored.name)}
    root = workdir / "data"
    with disk_errors(str(workdir)):
        _tidy(workdir)
        (workdir / "archive.json").unlink(missing_ok=True)
        known = _read_manifest(workdir, source.location)
        root.mkdir(exist_ok=True)
        have = {
            name: known[name][1]
            for name, stored in wanted.items()
            if name in known and known[name][0] == [stored.size, stored.etag] and _size(root / name) == stored.size
        }
        for stale in sorted(set(known) - set(have)):
            _remove(root, stale)
        missing = [stored for name, stored in wanted.items() if name not in have]
        size = sum(stored.size for stored in missing)
        _enough_space(workdir, size)
        log.info(
            "sync: %d files, %d to download (%.1f MB), %d other objects ignored",
            len(wanted), len(missing), size / 1e6, len(listing) - len(wanted),
        )  # fmt: skip
        digests = dict(have)
        with _manifest(workdir, source.location, wanted, have) as record, _pool() as pool:
            for some in _batched(missing, 64 * THREADS):
                for stored, digest in zip(
                    some, pool.map(lambda s: _download(source, s, root / s.name, workdir), some), strict=True
                ):
                    record(stored, digest)
                    digests[stored.name] = digest
    return Synced(root, digests)


def _download(source: Place, stored: Stored, target: Path, workdir: Path) -> str:
    """Into a nameless neighbour first: what bears the name is whole."""
    partial = workdir / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=partial)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            digest = source.download(stored, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(beside).replace(target)
    finally:
        Path(beside).unlink(missing_ok=True)
    return digest


def _claim(workdir: Path) -> None:
    """Mark the folder as ours; all that is removed later is below names that were free then.

    Raises:
        SettingsError: they are not free.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mark = workdir / ".crowdlayer"
    if mark.exists():
        return
    taken = [name for name in ("data", "files", "partial", "archive") if (workdir / name).exists()]
    if taken:
        raise SettingsError(f"WORKDIR: must be a folder for this job alone, {workdir} has {taken[0]}/ of another's")
    mark.touch()


def _tidy(workdir: Path) -> None:
    """Remove what a killed sync left half done."""
    _claim(workdir)
    for folder in ("partial", "archive"):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def _remove(root: Path, name: str) -> None:
    """Remove a file and the folders that are empty without it: a file may come to be where they are."""
    (root / name).unlink(missing_ok=True)
    while name := name.rpartition("/")[0]:
        try:
            (root / name).rmdir()
        except OSError:
            return


def _read_manifest(workdir: Path, location: str) -> dict[str, tuple[list[object], str]]:
    """Name → ([size, etag], sha256) of what an earlier sync from the same place brought; its torn last line ignored.

    Files from elsewhere are removed.
    """
    path = workdir / "manifest.jsonl"
    if not path.is_file():
        shutil.rmtree(workdir / "data", ignore_errors=True)
        return {}
    found: dict[str, tuple[list[object], str]] = {}
    with path.open(encoding="utf-8") as lines:
        if next(lines, "").strip() != json.dumps({"location": location}):
            shutil.rmtree(workdir / "data", ignore_errors=True)
            return {}
        for line in lines:
            try:
                name, size, etag, digest = json.loads(line)
            except ValueError:
                continue
            found[name] = ([size, etag], digest)
    return found


@contextmanager
def _manifest(
    workdir: Path, location: str, wanted: dict[str, Stored], have: dict[str, str]
) -> Iterator[Callable[[Stored, str], None]]:
    """A fresh manifest of what is there, to which each further file is appended: a killed sync loses nothing."""
    path = workdir / "manifest.jsonl"
    beside = path.with_suffix(".new")

    def line(stored: Stored, digest: str) -> str:
        return json.dumps([stored.name, stored.size, stored.etag, digest]) + "\n"

    with beside.open("w", encoding="utf-8", buffering=1) as file:  # each line is there at once
        file.write(json.dumps({"location": location}) + "\n")
        file.writelines(line(wanted[name], digest) for name, digest in have.items())
        beside.replace(path)
        yield lambda stored, digest: (file.write(line(stored, digest)), None)[1]


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads whose waiting work is dropped when something fails."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _batched(items: Iterable[Stored], n: int) -> Iterator[list[Stored]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n)):
        yield batch


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _enough_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need and need + SPARE > free:
        raise StoreError(f"{folder}: {(need + SPARE) / 1e6:.0f} MB of disk are needed, {free / 1e6:.0f} MB are free")


# --- archives --------------------------------------------------------------------------------------------------------


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


def _sync_archive(location: str, workdir: Path, belongs: Callable[[str], bool]) -> Synced:
    """Unpack the archive into workdir/data; workdir/archive.json remembers which one that was."""
    root, memory = workdir / "data", workdir / "archive.json"
    folder, _, name = location.rpartition("/")
    source = place(folder or ("/" if location.startswith("/") else "."))
    stored = source.find(name)
    if stored is None:
        raise SettingsError(f"TASKS: must be a folder, an s3:// URI or an archive; there is none at {location}")
    with disk_errors(str(workdir)):
        _tidy(workdir)
        path = Path(location)
        with disk_errors(location):
            version = [location, stored.size, stored.etag or file_digest(path)]
        digests = _remembered(memory, version, root)
        if digests is not None:
            return Synced(root, digests)
        for memento in (memory, workdir / "manifest.jsonl"):
            memento.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        if stored.etag:
            path = workdir / "archive" / name
            _enough_space(workdir, stored.size)
            _download(source, stored, path, workdir)
        try:
            with _opened(path) as members:
                digests = _unpack(_top_stripped(members), root, workdir, belongs)
        except (*BROKEN, OSError) as error:
            if not isinstance(error, BROKEN) and error.errno != errno.EINVAL:  # an offset that cannot be
                raise
            raise DataError(f"{location}: must be a whole archive: {one_line(str(error))}") from error
        if stored.etag:
            path.unlink()
        beside = memory.with_suffix(".new")
        files = {member: [_size(root / member), digest] for member, digest in digests.items()}
        beside.write_text(json.dumps({"version": version, "files": files}))
        beside.replace(memory)
        log.info("archive unpacked: %d files of %s", len(digests), location)
    return Synced(root, digests)


def _remembered(memory: Path, version: list[object], root: Path) -> dict[str, str] | None:
    """The digests of what was unpacked of this very archive, where all of it is still there."""
    try:
        said = json.loads(memory.read_bytes())
        files: dict[str, tuple[int, str]] = said["files"] if said["version"] == version else {}
    except (FileNotFoundError, ValueError, KeyError):
        return None
    if not files or any(_size(root / name) != size for name, (size, _) in files.items()):
        return None
    return {name: digest for name, (_, digest) in files.items()}


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


def _unpack(members: list[Member], root: Path, workdir: Path, belongs: Callable[[str], bool]) -> dict[str, str]:
    safe_names([member.name for member in members])
    wanted = [member for member in members if belongs(member.name)]
    twice = sorted(name for name, n in Counter(member.name for member in wanted).items() if n > 1)
    if twice:
        raise DataError(listed([f"{one_line(name)!r}: must be in the archive once" for name in twice]))
    _enough_space(workdir, sum(member.size for member in wanted))
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
