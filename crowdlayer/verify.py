"""Whether what a run has published is still what it wrote: `python -m crowdlayer.verify <results>`."""

from __future__ import annotations

import logging
import sys
import tempfile

import msgspec

from . import command
from .errors import Complaints, DataError
from .report.runs import runs_at
from .storage.files import Stored, decode_json, disk_errors
from .storage.places import Place

USAGE = """python -m crowdlayer.verify RESULTS

RESULTS   results/<name>.json, or the folder or s3:// prefix above, with the results of one run or of many"""

log = logging.getLogger("crowdlayer.verify")  # __name__ is another, run as a program


class _Job(msgspec.Struct):
    files: dict[str, str]


class _Results(msgspec.Struct):
    """What of the results is needed here."""

    job: _Job


def verify(location: str) -> int:
    """Read every file that the results at `location` name, and compare it with its digest; returns how many.

    Args:
        location: of the results of one run, `…/results/<name>.json`, or of an OUTPUT, with those of one run or of many.

    Raises:
        DataError: naming each file that is missing or not the same.
        SettingsError: there are no results.
    """
    output, results = runs_at(location)
    stored = {file.name: file for folder in ("results", "best_models") for file in output.below(folder)}
    complaints = Complaints()
    n_files = 0
    for name in results:
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

    return command.run(USAGE, work, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
