"""Folders and buckets behind one interface."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, TypeVar

from ..errors import DataError, SettingsError, StoreError, short
from ..settings import one_spelling
from .durable import flush_folder, whole
from .files import CHUNK, LONGEST_NAME, Stored, disk_errors, file_digest
from .s3 import Bucket

T = TypeVar("T")


class Place(Protocol):
    """A folder or a bucket's prefix. Names are relative, with slashes."""

    location: str

    def below(self, folder: str) -> list[Stored]: ...
    def find(self, name: str) -> Stored | None: ...
    def read(self, name: str) -> bytes | None: ...
    def download(self, stored: Stored, file: IO[bytes]) -> str: ...
    def consume(self, stored: Stored, use: Callable[[io.BufferedReader], T]) -> T: ...
    def upload(self, source: Path, name: str) -> None: ...
    def compare(self, source: Path, name: str) -> None: ...
    def delete(self, name: str) -> None: ...
    def prune(self, folder: str) -> None: ...


def place(location: str) -> Place:
    """The folder or the bucket's prefix that `location` names."""
    return bucket_at(location) if location.startswith("s3://") else Folder(Path(location))


def bucket_at(location: str) -> Bucket:
    """The bucket's prefix that an s3:// URI names."""
    bucket, _, prefix = one_spelling(location).removeprefix("s3://").partition("/")
    return Bucket(bucket, prefix.strip("/"))


class Folder:
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self._made: set[Path] = set()
        self._making = threading.Lock()

    def listing(
        self, entered: Callable[[str], bool] = lambda _: True, nowhere: Callable[[str], None] = lambda _: None
    ) -> list[Stored]:
        """All files below, links followed, but not to a folder that the link is in.

        Args:
            entered: whether to look into a folder, by its name relative to this one: a disk's lost+found refuses it.
            nowhere: is told each link that leads nowhere, or to itself.

        Raises:
            SettingsError: no such folder.
            DataError: it is too deep.
        """
        with disk_errors(self.location):
            if not self.path.is_dir():
                raise SettingsError(f"{self.location}: must be a folder, an s3:// URI or an archive; there is none")
        return list(self._below("", entered, nowhere, frozenset()))

    def below(self, folder: str) -> list[Stored]:
        """The files below a folder of this one; none where there is no such folder."""
        with disk_errors(f"{self.location}/{folder}"):
            there = (self.path / folder).is_dir()
        return list(self._below(f"{folder}/", lambda _: True, lambda _: None, frozenset())) if there else []

    def _below(
        self,
        prefix: str,
        entered: Callable[[str], bool],
        nowhere: Callable[[str], None],
        above: frozenset[tuple[int, int]],
    ) -> Iterator[Stored]:
        folder = self.path / prefix
        if len(prefix) > LONGEST_NAME:  # Python's own stack has an end, too
            raise DataError(f"{short(prefix, 300)!r}: a name must have at most {LONGEST_NAME} bytes")
        with disk_errors(str(folder)):
            status = folder.stat()
            this = (status.st_dev, status.st_ino)
            if this in above:
                return
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = prefix + entry.name
            with disk_errors(entry.path):
                if entry.is_symlink() and not Path(entry.path).exists():
                    nowhere(name)
                    continue
                is_folder = entry.is_dir()
                size = entry.stat().st_size if entry.is_file() else None
            if is_folder and entered(name):
                yield from self._below(f"{name}/", entered, nowhere, above | {this})
            elif size is not None:
                yield Stored(name, size, "")

    def find(self, name: str) -> Stored | None:
        with disk_errors(f"{self.location}/{name}"):
            path = self.path / name
            return Stored(name, path.stat().st_size, "") if path.is_file() else None

    def read(self, name: str) -> bytes | None:
        with disk_errors(f"{self.location}/{name}"):
            path = self.path / name
            return path.read_bytes() if path.is_file() else None

    def download(self, stored: Stored, file: IO[bytes]) -> str:
        """Copy into `file`; returns the SHA-256."""
        with disk_errors(f"{self.location}/{stored.name}"), (self.path / stored.name).open("rb") as source:
            shutil.copyfileobj(source, file, CHUNK)
            source.seek(0)
            return hashlib.file_digest(source, "sha256").hexdigest()

    def consume(self, stored: Stored, use: Callable[[io.BufferedReader], T]) -> T:
        """What `use` makes of the bytes of the file."""
        with disk_errors(f"{self.location}/{stored.name}"):
            file = (self.path / stored.name).open("rb")
        with file:
            return use(file)

    def upload(self, source: Path, name: str) -> None:
        """Copy beside, compare, flush to the disk, rename: never half there under its name."""
        target = self.path / name
        with disk_errors(f"{self.location}/{name}"):
            try:
                self._make(target.parent)
                with source.open("rb") as read, whole(target) as written:
                    shutil.copyfileobj(read, written, CHUNK)
                    written.seek(0)
                    if hashlib.file_digest(written, "sha256").hexdigest() != file_digest(source):
                        raise StoreError(f"{self.location}/{name}: must read back as it was written, it does not")
            except BaseException:
                self._tidy(target.parent)
                raise

    def compare(self, source: Path, name: str) -> None:
        """Compare a file with what it was made of."""
        with disk_errors(f"{self.location}/{name}"):
            if file_digest(self.path / name) != file_digest(source):
                raise StoreError(f"{self.location}/{name}: must be there as it was put, it is not")

    def _make(self, folder: Path, tries: int = 10) -> None:
        """Make a folder and those above it, and remember which were not there."""
        try:
            with self._making:
                for path in (*reversed(folder.parents), folder):
                    if not path.is_dir():
                        path.mkdir(exist_ok=True)
                        self._made.add(path)
                        flush_folder(path.parent)
        except FileExistsError as error:
            if tries > 1 and (path.is_dir() or not os.path.lexists(path)):  # a folder, tidied away or back meanwhile
                self._make(folder, tries - 1)
                return
            raise SettingsError(f"{self.location}: must be a folder, a file is in its place: {path}") from error
        except FileNotFoundError:  # another run of this output has tidied the one above away meanwhile
            if tries == 1:
                raise
            self._make(folder, tries - 1)

    def delete(self, name: str) -> None:
        """Remove the file, and the folders that were made here and are empty without it."""
        with disk_errors(f"{self.location}/{name}"):
            path = self.path / name
            try:
                path.unlink()
                flush_folder(path.parent)
            except FileNotFoundError:
                pass
            finally:
                self._tidy(path.parent)

    def _tidy(self, folder: Path) -> None:
        """Remove the folder and those above it that were made here and are empty.

        No others: another thread may have made them a moment ago, for its file.
        """
        with self._making:
            for path in (folder, *folder.parents):
                if path not in self._made:
                    continue  # not there, where the disk failed on the way to it, or somebody else's
                try:
                    path.rmdir()
                except FileNotFoundError:
                    pass  # somebody else's tidying
                except OSError:  # not empty
                    return
                self._made.discard(path)

    def prune(self, folder: str) -> None:
        """Remove a folder of this one, and those above it, that are empty."""
        while folder:
            try:
                (self.path / folder).rmdir()
            except OSError:  # not empty, or not there
                return
            folder = folder.rpartition("/")[0]
