"""A bucket → workdir/data: only what is new or changed by size and ETag is downloaded."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ..logs import track
from ..machine.cpus import cpus
from .files import Stored, disk_errors, enough_space, file_digest, safe_names, size_of
from .manifest import brought, recording
from .s3 import Bucket
from .workdir import bring, remove, tidy

log = logging.getLogger(__name__)


def sync_bucket(source: Bucket, workdir: Path, belongs: Callable[[str], bool]) -> dict[str, str]:
    """Bring what is new or changed into workdir/data, and remove what is not there any more.

    Returns:
        The SHA-256 of each file by its name.
    """
    listing = source.listing()
    wanted = {stored.name: stored for stored in listing if belongs(stored.name)}
    safe_names(list(wanted))
    root = workdir / "data"
    with disk_errors(str(workdir)):
        tidy(workdir)
        (workdir / "archive.json").unlink(missing_ok=True)
        known, flushed = brought(workdir, source.location)
        have = {
            name: known[name].digest
            for name, stored in wanted.items()
            if name in known and known[name].is_of(stored) and size_of(root / name) == stored.size
        }
        for torn in _torn(root, {name: digest for name, digest in have.items() if name not in flushed}):
            del have[torn]
        for stale in sorted(set(known) - set(have)):
            remove(root, stale)
        missing = [stored for name, stored in wanted.items() if name not in have]
        size = sum(stored.size for stored in missing)
        enough_space(workdir, size)
        log.info(
            "sync: %d files, %d to download (%.1f MB), %d other objects ignored",
            len(wanted), len(missing), size / 1e6, len(listing) - len(wanted),
        )  # fmt: skip
        digests = dict(have)
        with recording(workdir, source.location, wanted, have, flushed) as record, _pool(source.threads) as pool:

            def arriving() -> Iterator[tuple[Stored, str]]:
                for some in _batched(missing, 64 * source.threads):
                    yield from zip(
                        some, pool.map(lambda s: bring(source, s, root / s.name, workdir), some), strict=True
                    )

            for stored, digest in track(arriving(), "sync", size, "B", size=lambda arrived: arrived[0].size):
                record(stored, digest)
                digests[stored.name] = digest
    return digests


def _torn(root: Path, digests: dict[str, str]) -> list[str]:
    """The names of the files that are not what was written: a power loss may leave zeros, of the right size."""
    with ThreadPoolExecutor(cpus()) as pool:
        found = pool.map(lambda name: file_digest(root / name), digests)
        return [name for name, digest in zip(digests, found, strict=True) if digest != digests[name]]


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
