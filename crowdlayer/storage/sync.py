"""A data set at any place → files on this machine, each with its SHA-256."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import DataError, SettingsError, listed, short
from ..machine.cpus import cpus
from ..settings import ARCHIVES, is_archive
from .buckets import sync_bucket
from .files import disk_errors, enough_space, file_digest, safe_names
from .places import Folder, bucket_at, place
from .unpacking import sync_archive
from .workdir import bring, is_ours

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Synced:
    """The files below `root`: their relative names, each with its SHA-256."""

    root: Path
    digests: dict[str, str]

    def digest(self) -> str:
        """One SHA-256 for all: the same for a folder, a bucket and an archive with the same tree of files."""
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
        synced = Synced(workdir / "data", sync_archive(location, workdir, belongs, setting))
    elif location.startswith("s3://"):
        synced = Synced(workdir / "data", sync_bucket(bucket_at(location), workdir, belongs))
    else:
        synced = Synced(Path(location), _in_place(location, belongs))
    if not synced.digests:
        raise DataError(f"{location}: must hold {needed}, holds no such file")
    return synced


def _in_place(location: str, belongs: Callable[[str], bool]) -> dict[str, str]:
    """The SHA-256 of each file of a folder by its name.

    An image that is a link to nowhere is there as an empty file: it is broken, and not one image less without a word.
    """
    folder = Folder(Path(location))
    nowhere: list[str] = []
    listing = folder.listing(entered=lambda name: belongs(_picture_in(name)), nowhere=nowhere.append)
    names = [stored.name for stored in listing if belongs(stored.name)]
    gone = {name for name in nowhere if belongs(name) and belongs(_picture_beside(name))}
    folders = [short(name) for name in nowhere if belongs(_picture_in(name)) and name not in gone]
    if folders:
        log.warning("left out: %d links that lead nowhere: %s", len(folders), listed(folders))

    def digest(name: str) -> str:
        with disk_errors(f"{location}/{name}"):
            return file_digest(Path(location) / name)

    with ThreadPoolExecutor(cpus()) as pool:
        found = dict(zip(names, pool.map(digest, names), strict=True))
    return found | dict.fromkeys(sorted(gone), hashlib.sha256().hexdigest())


def must_be_there(location: str, setting: str = "TASKS") -> None:
    """Refuse a data set that is not on this machine though it should be, before anything is written where it is not.

    Raises:
        SettingsError: no such folder, no such archive.
    """
    if not location.startswith("s3://"):
        with disk_errors(location):
            there = Path(location).is_file() if is_archive(location) else Path(location).is_dir()
            found = "another file" if Path(location).is_file() else "none"
        if not there:
            rule = f"must be a folder, an s3:// URI or an archive ({', '.join(ARCHIVES)})"
            raise SettingsError(f"{setting}: {rule}; there is {found} at {location}")


def must_stay_apart(location: str, others: dict[str, str | None], belongs: Callable[[str], bool]) -> None:
    """Refuse to write where the images of the data set are: the next run would take what was written for some more.

    Args:
        others: settings that name a place to write to.

    Raises:
        SettingsError: such a place is among the images.
    """
    for setting, other in others.items():
        name = None if other is None else inside(other, location)
        if name is not None and belongs(_picture_in(name)):
            raise SettingsError(f"{setting}: must not be among the images of {location}, is {other}")


def must_outlast(workdir: str | None, others: dict[str, str | None]) -> None:
    """Refuse to write where jobs remove what they find: results would be gone with the job that has put them.

    Args:
        workdir: WORKDIR as it is named.
        others: settings that name a place to write to.

    Raises:
        SettingsError: such a place is in a folder of WORKDIR that is the jobs' own.
    """
    for setting, other in others.items():
        name = None if workdir is None or other is None else inside(other, workdir)
        if name is not None and is_ours(name):
            raise SettingsError(f"{setting}: must not be in a folder of WORKDIR that jobs make and remove, is {other}")


def _picture_in(folder: str) -> str:
    """A name that belongs to a data set if images of that folder do."""
    return f"{folder}/picture.png"


def _picture_beside(name: str) -> str:
    """A name that belongs to a data set if images do where `name` is."""
    return str(PurePosixPath(name).with_name("picture.png"))


def inside(location: str, folder: str) -> str | None:
    """The name of `location` relative to `folder`, "." for itself; None where it is elsewhere."""
    if location.startswith("s3://") or folder.startswith("s3://"):
        if location == folder:
            return "."
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
        enough_space(workdir, stored.size)
        return target, bring(source, stored, target, workdir)
