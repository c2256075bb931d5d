"""manifest.jsonl of a WORKDIR: what a sync from a bucket has brought, a line per file, so that none is brought twice.

{"location": "s3://bucket/prefix"}
["train/cat/1.png", size, etag, sha256]
"flushed"
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .durable import flush_disk, whole
from .files import Stored, decode_json, safe_names

FLUSHED = b'"flushed"\n'
"""A line of the manifest: the files of the lines above are on the disk, whatever happens."""


@dataclass(frozen=True)
class Brought:
    """Which version of an object was brought, and its SHA-256."""

    size: int
    etag: str
    digest: str

    def is_of(self, stored: Stored) -> bool:
        """Whether the place has that version still."""
        return (self.size, self.etag) == (stored.size, stored.etag)


def brought(workdir: Path, location: str) -> tuple[dict[str, Brought], set[str]]:
    """What an earlier sync from the same place has brought, by name; a torn last line is ignored.

    Files from elsewhere are removed. Second, the names of those that were flushed to the disk.
    """
    path = workdir / "manifest.jsonl"
    found: dict[str, Brought] = {}
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
            found[name] = Brought(size, etag, digest)
    return found, flushed


@contextmanager
def recording(
    workdir: Path, location: str, wanted: dict[str, Stored], have: dict[str, str], flushed: set[str]
) -> Iterator[Callable[[Stored, str], None]]:
    """A fresh manifest of what is there, to which each further file is appended: a killed sync loses nothing.

    Args:
        wanted: all that shall be there in the end, when it is flushed to the disk.
        have: the SHA-256 of what is there already, by name; of these `flushed` are on the disk.
    """
    path = workdir / "manifest.jsonl"

    def line(stored: Stored, digest: str) -> bytes:
        return json.dumps([stored.name, stored.size, stored.etag, digest]).encode() + b"\n"

    def lines(names: Iterable[str]) -> list[bytes]:
        return [line(wanted[name], have[name]) for name in names]

    with whole(path) as file:
        file.write(json.dumps({"location": location}).encode() + b"\n")
        file.writelines([*lines(have.keys() & flushed), FLUSHED, *lines(have.keys() - flushed)])
    with path.open("ab", buffering=0) as more:  # each line is there at once

        def record(stored: Stored, digest: str) -> None:
            more.write(line(stored, digest))

        yield record
        if wanted.keys() - flushed:
            flush_disk(workdir)
            more.write(FLUSHED)
