"""A command beside the job: its arguments, its exit code, its last line."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from . import logs
from .errors import CrowdlayerError, SettingsError
from .machine.last_words import LastWords
from .masking import without_secrets
from .settings import quoted
from .storage.files import disk_errors
from .streams import open_all, say


def run(usage: str, work: Callable[..., str | None], arguments: Sequence[str]) -> int:
    """Do `work` with the arguments, as many as it takes; returns the contract's exit code, like the job.

    What `work` returns goes to standard output. A failure's last line on standard error names the thing, the rule and
    the value. The first line of `usage` is how the command is called; --help shows the others, too.
    """
    open_all()
    if set(arguments) & {"-h", "--help"}:
        say(f"usage: {usage}", sys.stdout)
        return 0
    logs.start("text")
    try:
        try:
            given = inspect.signature(work).bind(*arguments)
        except TypeError as error:  # too few, or too many
            raise SettingsError(f"usage: {usage.splitlines()[0]}") from error
        if said := work(*given.args):
            say(said, sys.stdout)
        return 0
    except (CrowdlayerError, MemoryError) as error:
        words = LastWords.of(error)
    except Exception as error:  # as in the job: a traceback for a fault of the program, and for nothing else
        words = LastWords.of(error)
        say(without_secrets(traceback.format_exc()).rstrip("\n"), sys.stderr)
    say(without_secrets(f"crowdlayer: {words.line}"), sys.stderr)  # the last line, as the job's
    return words.code


def on_this_machine(name: str, given: str) -> Path:
    """The path of a file that the argument `name` gives.

    Raises:
        SettingsError: it is a URI.
    """
    if "://" in given:
        raise SettingsError(f"{name}: must be a file on this machine, got {quoted(given)}")
    return Path(given)


def to_write(name: str, given: str) -> Path:
    """The path of a file that shall be written.

    Raises:
        SettingsError: it is a URI, a folder, a pipe or a device, or in a folder that is not there.
        AccessError: it cannot be told.
    """
    path = on_this_machine(name, given)
    with disk_errors(str(path)):
        if path.is_symlink():  # which stays; what it leads to is replaced
            path = path.resolve()
        if (path.exists() and not path.is_file()) or not path.parent.is_dir():
            raise SettingsError(f"{name}: must be a file in a folder that is there, got {quoted(given)}")
    return path
