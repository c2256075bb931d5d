"""A data set at any place → files on this machine, each with its SHA-256."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError, SettingsError
from ..logs import track
from ..machine.cpus import cpus
from ..settings import is_archive
from .archive import Unpacked, must_be_whole, put_in_place, unpack
from .durable import flush_disk, flush_folder, whole
from .files import Stored, decode_json, disk_errors, enough_space, file_digest, safe_names, size_of
from .places import Place, place

log = logging.getLogger(__name__)


FLUSHED = b'"flushed"\n'
"""A line of the manifest: the files of the lines above are on the disk, whatever happens."""


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


def sync(
    location: str,
    workdir: Path,
    belongs: Callable[[str], bool],
    setting: str = "TASKS",
    needed: str = "train/ and answers.json",
) -> Synced:
    """Bring the files that belong to the data set to this machine.

    A folder is read in place. A bucket comes into workdir/data, only what is new or changed by size and ETag; an
    archive is unpacked there, unless the very same one was. What came is flushed to the disk at once in the end: to
    flush image by image takes longer than to write them. Until then a start that goes on compares digests.

    Raises:
        DataError: names that must not become files, an archive that cannot be read, nothing there at all.
        SettingsError, AccessError, StoreError: as the place says.
    """
    if is_archive(location):
        synced = _sync_archive(location, workdir, belongs, setting)
    elif location.startswith("s3://"):
        synced = _sync_bucket(place(location), workdir, belongs)
    else:
        folder = place(location)
        names = [stored.name for stored in folder.listing() if belongs(stored.name)]
        root = Path(location)

        def digest(name: str) -> str:
            with disk_errors(f"{location}/{name}"):
                return file_digest(root / name)

        with ThreadPoolExecutor(cpus()) as pool:
            synced = Synced(root, dict(zip(names, pool.map(digest, names), strict=True)))
    if not synced.digests:
        raise DataError(f"{location}: must hold {needed}, holds no such file")
    return synced


def must_be_there(location: str, setting: str = "TASKS") -> None:
    """Refuse a data set that is not on this machine though it should be, before anything is written where it is not.

    Raises:
        SettingsError: no such folder, no such archive.
    """
    if not location.startswith("s3://"):
        with disk_errors(location):
            there = Path(location).is_file() if is_archive(location) else Path(location).is_dir()
        if not there:
            raise SettingsError(f"{setting}: must be a folder, an s3:// URI or an archive; there is none at {location}")


def must_stay_apart(location: str, others: dict[str, str | None], belongs: Callable[[str], bool]) -> None:
    """Refuse to write where the images of the data set are: the next run would take what was written for some more.

    Args:
        others: settings that name a place to write to.

    Raises:
        SettingsError: such a place is among the images.
    """
    for setting, other in others.items():
        inside = None if other is None else _inside(other, location)
        if inside is not None and belongs(f"{inside}/picture.png"):
            raise SettingsError(f"{setting}: must not be among the images of {location}, is {other}")


def _inside(location: str, folder: str) -> str | None:
    """The name of `location` relative to `folder`; None where it is elsewhere."""
    if location.startswith("s3://") or folder.startswith("s3://"):
        return location.removeprefix(f"{folder}/") if location.startswith(f"{folder}/") else None
    path, above = Path(location).resolve(), Path(folder).resolve()
    return path.relative_to(above).as_posix() if path.is_relative_to(above) else None


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
        enough_space(workdir, stored.size)
        return target, _download(source, stored, target, workdir)


# --- buckets ---------------------------------------------------------------------------------------------------------


def _sync_bucket(source: Place, workdir: Path, belongs: Callable[[str], bool]) -> Synced:
    listing = source.listing()
    safe_names([stored.name for stored in listing])
    wanted = {stored.name: stored for stored in listing if belongs(stored.name)}
    root = workdir / "data"
    with disk_errors(str(workdir)):
        _tidy(workdir)
        (workdir / "archive.json").unlink(missing_ok=True)
        known, flushed = _read_manifest(workdir, source.location)
        root.mkdir(exist_ok=True)
        have = {
            name: known[name][1]
            for name, stored in wanted.items()
            if name in known and known[name][0] == [stored.size, stored.etag] and size_of(root / name) == stored.size
        }
        for torn in _torn(root, {name: digest for name, digest in have.items() if name not in flushed}):
            del have[torn]
        for stale in sorted(set(known) - set(have)):
            _remove(root, stale)
        missing = [stored for name, stored in wanted.items() if name not in have]
        size = sum(stored.size for stored in missing)
        enough_space(workdir, size)
        log.info(
            "sync: %d files, %d to download (%.1f MB), %d other objects ignored",
            len(wanted), len(missing), size / 1e6, len(listing) - len(wanted),
        )  # fmt: skip
        digests = dict(have)
        with _manifest(workdir, source.location, wanted, have, flushed) as record, _pool(source.threads) as pool:

            def arriving() -> Iterator[tuple[Stored, str]]:
                for some in _batched(missing, 64 * source.threads):
                    yield from zip(
                        some, pool.map(lambda s: _download(source, s, root / s.name, workdir), some), strict=True
                    )

            for stored, digest in track(arriving(), "sync", size, "B", size=lambda arrived: arrived[0].size):
                record(stored, digest)
                digests[stored.name] = digest
    return Synced(root, digests)


def _torn(root: Path, digests: dict[str, str]) -> list[str]:
    """The names of the files that are not what was written: a power loss may leave zeros, of the right size."""
    with ThreadPoolExecutor(cpus()) as pool:
        found = pool.map(lambda name: file_digest(root / name), digests)
        return [name for name, digest in zip(digests, found, strict=True) if digest != digests[name]]


def _download(source: Place, stored: Stored, target: Path, workdir: Path) -> str:
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


def _read_manifest(workdir: Path, location: str) -> tuple[dict[str, tuple[list[object], str]], set[str]]:
    """Name → ([size, etag], sha256) of what an earlier sync from the same place brought; its torn last line ignored.

    Files from elsewhere are removed. The names of those beside that were flushed to the disk.
    """
    path = workdir / "manifest.jsonl"
    found: dict[str, tuple[list[object], str]] = {}
    flushed: set[str] = set()
    if not path.is_file():
        shutil.rmtree(workdir / "data", ignore_errors=True)
        return found, flushed
    with path.open("rb") as lines:
        if next(lines, b"").strip() != json.dumps({"location": location}).encode():
            shutil.rmtree(workdir / "data", ignore_errors=True)
            return found, flushed
        for line in lines:
            if line == FLUSHED:
                flushed = set(found)
                continue
            try:
                name, size, etag, digest = decode_json(line, tuple[str, int, str, str])
                safe_names([name])
            except (ValueError, DataError):
                continue
            found[name] = ([size, etag], digest)
    return found, flushed


@contextmanager
def _manifest(
    workdir: Path, location: str, wanted: dict[str, Stored], have: dict[str, str], flushed: set[str]
) -> Iterator[Callable[[Stored, str], None]]:
    """A fresh manifest of what is there, to which each further file is appended: a killed sync loses nothing."""
    path = workdir / "manifest.jsonl"

    def line(stored: Stored, digest: str) -> bytes:
        return json.dumps([stored.name, stored.size, stored.etag, digest]).encode() + b"\n"

    def lines(names: Iterable[str]) -> list[bytes]:
        return [line(wanted[name], have[name]) for name in names]

    with whole(path) as file:
        file.write(json.dumps({"location": location}).encode() + b"\n")
        file.writelines([*lines(have.keys() & flushed), FLUSHED, *lines(have.keys() - flushed)])
    with path.open("ab", buffering=0) as more:  # each line is there at once
        yield lambda stored, digest: (more.write(line(stored, digest)), None)[1]
        if wanted.keys() - flushed:
            flush_disk(workdir)
            more.write(FLUSHED)


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose waiting work is dropped when something fails."""
    pool = ThreadPoolExecutor(threads)
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


# --- archives --------------------------------------------------------------------------------------------------------


def _sync_archive(location: str, workdir: Path, belongs: Callable[[str], bool], setting: str) -> Synced:
    """Unpack the archive into workdir/data; workdir/archive.json remembers which one that was."""
    root, memory = workdir / "data", workdir / "archive.json"
    folder, _, name = location.rpartition("/")
    source = place(folder or ("/" if location.startswith("/") else "."))
    stored = source.find(name)
    if stored is None:
        raise SettingsError(f"{setting}: must be a folder, an s3:// URI or an archive; there is none at {location}")
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
        flush_folder(workdir)
        shutil.rmtree(root, ignore_errors=True)
        digests = put_in_place(_unpacked(source, stored, location, workdir / "archive", belongs), root)
        shutil.rmtree(workdir / "archive")
        flush_disk(workdir)
        files = {member: [size_of(root / member), digest] for member, digest in digests.items()}
        with whole(memory) as file:
            file.write(json.dumps({"version": version, "files": files}).encode())
        log.info("archive unpacked: %d files of %s", len(digests), location)
    return Synced(root, digests)


def _unpacked(
    source: Place, stored: Stored, location: str, beside: Path, belongs: Callable[[str], bool]
) -> list[Unpacked]:
    """The files of an archive, beside: of a tar in a bucket while it is downloaded, of a zip when it is there whole."""

    def use(stream: io.BufferedReader) -> list[Unpacked]:
        return unpack(stream, stored.size, location, beside / "files", belongs)

    if stored.etag:
        enough_space(beside.parent, stored.size)
    if not (stored.etag and must_be_whole(stored.name)):
        return source.consume(stored, use)
    path = beside / "whole"
    _download(source, stored, path, beside.parent)
    with path.open("rb") as whole:
        files = use(whole)
    path.unlink()
    return files


def _remembered(memory: Path, version: list[object], root: Path) -> dict[str, str] | None:
    """The digests of what was unpacked of this very archive, where all of it is still there."""
    try:
        said = decode_json(memory.read_bytes(), _Memory)
        safe_names(list(said.files))
    except (FileNotFoundError, ValueError, DataError):
        return None
    if said.version != version or not said.files:
        return None
    if any(size_of(root / name) != size for name, (size, _) in said.files.items()):
        return None
    return {name: digest for name, (_, digest) in said.files.items()}


class _Memory(msgspec.Struct):
    """What archive.json holds: which archive it was, and {name: (size, SHA-256)} of its files."""

    version: list[Any]
    files: dict[str, tuple[int, str]]
