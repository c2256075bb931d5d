"""Whether what a run has published is still what it wrote: `python -m crowdlayer.verify <output>`."""

from __future__ import annotations

import logging
import re
import sys
import tempfile

import msgspec

from . import command
from .errors import Complaints, DataError, SettingsError
from .settings import as_location, quoted
from .storage.files import Stored, decode_json, disk_errors
from .storage.places import Place, place

log = logging.getLogger("crowdlayer.verify")  # __name__ is another, run as a program


class _Job(msgspec.Struct):
    files: dict[str, str]


class _Results(msgspec.Struct):
    """What of the results is needed here."""

    job: _Job


def verify(location: str) -> int:
    """Read every file that the results at `location` name, and compare it with its digest; returns how many.

    Args:
        location: an OUTPUT, with the results of one run or of many.

    Raises:
        DataError: naming each file that is missing or not the same.
        SettingsError: there are no results.
    """
    try:
        output = place(as_location(location))
    except ValueError as error:
        raise SettingsError(f"output: {error}, got {quoted(location)}") from error
    stored = {file.name: file for folder in ("results", "best_models") for file in output.below(folder)}
    results = [name for name in stored if re.fullmatch(r"results/[^/]+\.json", name)]
    if not results:
        raise SettingsError(f"{output.location}: must hold results/<name>.json, holds none")
    complaints = Complaints()
    n_files = 0
    for name in sorted(results):
        with complaints:
            files = _digests(output, name)
            n_files += len(files)
            log.info("%s: %d files", name, len(files))
            _compare(output, stored, files)
    complaints.close()
    return n_files


def _digests(output: Place, name: str) -> dict[str, str]:
    """{file: SHA-256} of the results `name`."""
    try:
        return decode_json(output.read(name) or b"", _Results).job.files
    except ValueError as error:
        raise DataError(f"{name}: must be the results of a run: {error}") from error


def _compare(output: Place, stored: dict[str, Stored], files: dict[str, str]) -> None:
    complaints = []
    for name, digest in files.items():
        if name not in stored:
            complaints.append(f"{name}: must be there, is missing")
            continue
        with disk_errors(f"{name} in TMPDIR"), tempfile.TemporaryFile() as file:
            found = output.download(stored[name], file)
        if found != digest:
            complaints.append(f"{name}: must have the SHA-256 {digest}, has {found}")
    if complaints:
        raise DataError(*complaints)


def main(arguments: list[str]) -> int:
    """Verify; returns the contract's exit code: 65 where a file is not what it was, 74 and 77 as the store says."""

    def work(output: str) -> None:
        log.info("verified: all %d files are what the runs wrote", verify(output))

    return command.run("python -m crowdlayer.verify <output>, a folder or an s3:// prefix", work, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
