"""A data set in a folder or a bucket → one archive, which moves many small images several times as fast."""

from __future__ import annotations

import logging
import sys
import tarfile

from . import command
from .data.layout import belongs
from .errors import SettingsError, listed, short
from .settings import folder_and_name
from .storage.files import disk_errors, enough_space, safe_names, size_of
from .storage.places import place
from .storage.sync import sync
from .storage.workdir import working_folder

log = logging.getLogger("crowdlayer.pack")  # __name__ is another, run as a program


def pack(tasks: str, archive: str) -> int:
    """Write the files of the data set `tasks` to `archive`, a .tar in a folder or a bucket; returns their number.

    The same files make the same bytes: names in order, and nothing of this machine, time or user. Nothing is
    compressed, images are.

    Raises:
        SettingsError: `archive` is no name of a .tar.
        DataError, AccessError, StoreError: as `sync` and the place say.
    """
    folder, name = folder_and_name(archive)
    if not name.endswith(".tar") or folder == "s3:/":
        raise SettingsError(f"archive: must be a .tar in a folder or a bucket, got {archive}")
    with working_folder(None) as workdir:
        synced = sync(tasks, workdir, belongs)
        safe_names(list(synced.digests))  # as who unpacks it will
        found = {file: size_of(synced.root / file) for file in sorted(synced.digests)}
        sizes = {file: size for file, size in found.items() if size is not None}
        if nowhere := [short(file) for file, size in found.items() if size is None]:
            log.warning("left out: %d links that lead nowhere: %s", len(nowhere), listed(nowhere))
        enough_space(workdir, sum(sizes.values()) + 2 * tarfile.BLOCKSIZE * len(sizes))
        packed = workdir / name
        with disk_errors(str(workdir)), tarfile.open(packed, "w") as tar:
            for file, size in sizes.items():
                member = tarfile.TarInfo(file)
                member.size = size
                with (synced.root / file).open("rb") as content:
                    tar.addfile(member, content)
        place(folder).upload(packed, name)
    return len(sizes)


def main(arguments: list[str]) -> int:
    """`python -m crowdlayer.pack <tasks> <archive>.tar`; returns the contract's exit code."""

    def work(tasks: str, archive: str) -> None:
        log.info("packed: %d files of %s in %s", pack(tasks, archive), tasks, archive)

    return command.run("python -m crowdlayer.pack <tasks> <archive>.tar", work, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
