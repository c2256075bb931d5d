"""The job: settings from the environment, an exit code to the platform, the results' location on standard output."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # kept until they are listened to; PID 1 would lose them, others would die of them
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))

import io
import logging
import os
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a peer that is gone are frames of C++

from crowdlayer.errors import SettingsError
from crowdlayer.machine import interruption
from crowdlayer.machine.last_words import ending
from crowdlayer.machine.memory import enough_to_start
from crowdlayer.masking import without_secrets
from crowdlayer.streams import open_all, say

log = logging.getLogger("crowdlayer")

TERMINATION_LOG = Path("/dev/termination-log")

USAGE = """Usage: python entrypoint.py [predict | --check | --dry-run | --help | --version]

Trains an image classifier on the answers of a crowd; predict: labels the images of CROWDLAYER_PREDICT with it.
Configured by environment variables:
"""


def usage() -> str:
    """All settings with type, default and unit."""
    from crowdlayer.settings import table

    lines = [USAGE]
    for row in table():
        facts = [row.type, f"default {row.default}" if row.default not in ("", "required") else row.default, row.unit]
        lines.append(f"  {row.name}  ({', '.join(filter(None, facts))})\n      {row.text}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run; returns the exit code."""
    words, trace = ending(lambda: answer(arguments))
    return 0 if words is None else failed(words.line, words.code, trace)


def answer(arguments: list[str]) -> None:
    """Do and say what the arguments ask for."""
    interruption.listen(failed)  # one may have come already
    match arguments:
        case ["--help"] | ["-h"]:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `--help | head`
            say(usage(), sys.stdout)
        case ["--version"]:
            from crowdlayer import __version__

            say(__version__, sys.stdout)
        case [] | ["--check"] | ["--dry-run"] | ["predict"]:
            with redirect_stdout(sys.stderr):  # what libraries print, as MLflow does
                location = work(*arguments)
            if location:  # the first process and node have one
                say(location, sys.stdout)
        case _:
            known = "predict, --check, --dry-run, --help, --version or none"
            raise SettingsError(f"arguments: must be {known}, got {' '.join(arguments)}")


def work(what: str = "") -> str:
    """Do what is asked for, by the settings; returns the location of what was put."""
    from crowdlayer import logs
    from crowdlayer.settings import load_settings
    from crowdlayer.storage.files import disk_errors

    said = os.environ.get("CROWDLAYER_LOG_FORMAT", "")
    logs.start("json" if said.strip().lower() == "json" else "text")  # which tells of settings that are refused, too
    settings = load_settings()
    logs.start(settings.log_format)
    enough_to_start()
    with disk_errors("TMPDIR"):
        tempfile.gettempdir()  # or torch, which asks for it while it is imported, would raise its error
    from crowdlayer import check, job, predict
    from crowdlayer.storage.s3 import patience

    interruption.begin(settings.grace)
    patience.timeout, patience.attempts = settings.store_timeout, settings.store_attempts
    match what:
        case "--check":
            check.check(settings)
        case "--dry-run":
            job.dry_run(settings)
        case "predict":
            return predict.predict(settings)
        case _:
            return job.train(settings)
    return ""


def failed(line: str, code: int, trace: str = "") -> int:
    """Say why, where Kubernetes looks for it and as the last line of standard error; a fault's traceback before it."""
    last = without_secrets(f"crowdlayer: {line}")
    if TERMINATION_LOG.is_file():
        with suppress(OSError):  # a read-only one is not worth another failure
            TERMINATION_LOG.write_bytes(last.encode()[:4096])  # of more, Kubernetes would show the end
    told: dict[str, object] = {"exit_code": code}
    if trace and in_json():
        told["traceback"] = trace
    elif trace:
        say(trace, sys.stderr)
    if log.hasHandlers():  # the log has started
        log.error(line, extra=told)
    say(last, sys.stderr)
    return code


def in_json() -> bool:
    """Whether the log has started, and is an object per line."""
    if not log.hasHandlers():
        return False
    from crowdlayer import logs

    return logs.in_json()


if __name__ == "__main__":
    if sys.getfilesystemencoding() != "utf-8":  # an old locale's, in which the names of the data would be others
        os.environ["PYTHONUTF8"] = "1"  # for the training processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606  # nosec B606
    open_all()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a location has any characters, and those bytes that are none
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    code = main(sys.argv[1:])
    os._exit(code)  # neither threads that wait for a store nor torch's teardown may keep a job that has ended
