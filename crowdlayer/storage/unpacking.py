"""An archive at any place → workdir/data, once."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError, SettingsError
from ..settings import folder_and_name
from .archive import Unpacked, must_be_whole, put_in_place, unpack
from .durable import flush_disk, flush_folder, whole
from .files import Stored, disk_errors, enough_space, file_digest, safe_names, size_of
from .places import Place, place
from .workdir import bring, tidy

log = logging.getLogger(__name__)


def sync_archive(location: str, workdir: Path, belongs: Callable[[str], bool], setting: str) -> dict[str, str]:
    """Unpack the archive into workdir/data, unless that was done; workdir/archive.json remembers which one it was.

    Returns:
        The SHA-256 of each file by its name.
    """
    root, memory = workdir / "data", workdir / "archive.json"
    folder, name = folder_and_name(location)
    source = place(folder)
    stored = source.find(name)
    if stored is None:
        raise SettingsError(f"{setting}: must be a folder, an s3:// URI or an archive; there is none at {location}")
    with disk_errors(str(workdir)):
        tidy(workdir)
        path = Path(location)
        with disk_errors(location):
            version = [location, stored.size, stored.etag or file_digest(path)]
        digests = _remembered(memory, version, root)
        if digests is not None:
            return digests
        for memento in (memory, workdir / "manifest.jsonl"):
            memento.unlink(missing_ok=True)
        flush_folder(workdir)
        shutil.rmtree(root, ignore_errors=True)
        stripped = setting == "TASKS"
        files = _unpacked(source, stored, location, workdir / "archive", belongs, stripped)
        digests = put_in_place(files, root)
        shutil.rmtree(workdir / "archive")
        flush_disk(workdir)
        sizes = {member: [size_of(root / member), digest] for member, digest in digests.items()}
        with whole(memory) as file:
            file.write(json.dumps({"version": version, "files": sizes}).encode())
        log.info("archive unpacked: %d files of %s", len(digests), location)
    return digests


def _unpacked(
    source: Place, stored: Stored, location: str, beside: Path, belongs: Callable[[str], bool], stripped: bool
) -> list[Unpacked]:
    """The files of an archive, beside: of a tar in a bucket while it is downloaded, of a zip when it is there whole."""

    def use(stream: io.BufferedReader) -> list[Unpacked]:
        return unpack(stream, stored.size, location, beside / "files", belongs, stripped)

    if stored.etag:
        enough_space(beside.parent, stored.size)
    if not (stored.etag and must_be_whole(stored.name)):
        return source.consume(stored, use)
    path = beside / "whole"
    bring(source, stored, path, beside.parent)
    with path.open("rb") as archive:
        files = use(archive)
    path.unlink()
    return files


def _remembered(memory: Path, version: list[object], root: Path) -> dict[str, str] | None:
    """The digests of what was unpacked of this very archive, where all of it is still there."""
    try:
        said = msgspec.convert(json.loads(memory.read_bytes()), _Memory)  # json's own: it reads names that are no UTF-8
        safe_names(list(said.files))
    except (FileNotFoundError, ValueError, RecursionError, msgspec.ValidationError, DataError):
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
