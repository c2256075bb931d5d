"""The job: settings from the environment, an exit code to the platform, the results' location on standard output."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # kept until they are listened to; PID 1 would lose them, others would die of them
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))

import os
import sys
import traceback
from pathlib import Path

from crowdlayer.errors import (
    CrowdlayerError,
    DeviceMemoryError,
    InterruptedRunError,
    SettingsError,
    one_line,
    without_secrets,
)
from crowdlayer.machine import interruption
from crowdlayer.machine.memory import enough_to_start

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
    try:
        interruption.listen(failed)  # one may have come already
        match arguments:
            case ["--help"] | ["-h"]:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `--help | head`
                print(usage())
            case ["--version"]:
                from crowdlayer import __version__

                print(__version__)
            case [] | ["--check"] | ["--dry-run"] | ["predict"]:
                from crowdlayer import logs
                from crowdlayer.settings import load_settings

                settings = load_settings()
                interruption.set_grace(settings.grace)
                logs.start(settings.log_format)
                enough_to_start()
                from crowdlayer import check, job, predict
                from crowdlayer.storage.s3 import patience

                patience.timeout, patience.attempts = settings.store_timeout, settings.store_attempts
                location = ""
                match arguments:
                    case ["--check"]:
                        check.check(settings)
                    case ["--dry-run"]:
                        job.dry_run(settings)
                    case ["predict"]:
                        location = predict.predict(settings)
                    case _:
                        location = job.train(settings)
                if location:  # the first process and node have one
                    print(location, flush=True)
            case _:
                known = "predict, --check, --dry-run, --help, --version or none"
                raise SettingsError(f"arguments: must be {known}, got {' '.join(arguments)}")
        return 0
    except (CrowdlayerError, InterruptedRunError) as error:
        return failed(one_line(str(error)), error.exit_code)
    except MemoryError as error:
        return failed(f"out of memory: {one_line(str(error))}", DeviceMemoryError.exit_code)
    except BaseException as error:  # the one place that sees everything, to give it its exit code
        print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        return failed(f"a fault of the program: {type(error).__name__}: {one_line(str(error))}", 70)


def failed(line: str, code: int) -> int:
    """Say why, as the last line of standard error and where Kubernetes looks for it."""
    line = without_secrets(f"crowdlayer: {line}")
    print(line, file=sys.stderr, flush=True)
    if TERMINATION_LOG.is_file():
        try:
            TERMINATION_LOG.write_bytes(line.encode()[:4096])  # of more, Kubernetes would show the end
        except OSError:
            pass  # a read-only one is not worth another failure
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # neither threads that wait for a store nor torch's teardown may keep a job that has ended
