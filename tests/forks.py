"""Jobs by the hundred: a process that has imported what a job imports, and forks one job after another.

`python entrypoint.py` spends seconds on importing torch. Here the import is paid once; all else is as in a process of
its own: arguments, environment, standard streams, signals, exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that wait until a job listens."""


class Forks:
    """Starts jobs by forking; see `forking`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self,
        arguments: list[str],
        environment: dict[str, str],
        timeout: float = 120,
        signals: Sequence[tuple[float, int]] = (),
        constants: Mapping[str, int] | None = None,
        missing: Sequence[str] = (),
    ) -> tuple[int, str, str]:
        """The exit code of `python entrypoint.py …`, its standard output and its standard error.

        A job that takes longer than `timeout` seconds ends with -14, by SIGALRM.

        Args:
            signals: numbers, each with the seconds from the one before, or the start, to it.
            constants: {module and name: another value}.
            missing: modules that are not installed.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            order = {
                "arguments": arguments,
                "environment": environment,
                "streams": [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (out, err)],
                "timeout": timeout,
                "signals": list(signals),
                "constants": dict(constants or {}),
                "missing": list(missing),
            }
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(order), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return code, _whole(out), _whole(err)


def _whole(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


@contextmanager
def forking() -> Iterator[Forks]:
    """A process that forks, for as long as the context lasts."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CROWDLAYER_", "AWS_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Forks(process)
        finally:
            process.kill()


def _job(order: dict[str, Any]) -> None:
    from tests import aim

    for number, path in zip((1, 2), order["streams"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None
    signal.alarm(int(order["timeout"]))
    if planned := os.environ.pop("FAILING", ""):
        from tests import failing

        failing.install(planned)
    sys.modules.update(dict.fromkeys(order["missing"]))  # None is "there is none"
    for constant, value in order["constants"].items():
        module, _, name = constant.rpartition(".")
        setattr(importlib.import_module(module), name, value)
    os.setsid()  # a signal to its process group is for nobody else
    aim.take()
    script = str(ROOT / "entrypoint.py")
    sys.argv = [script, *order["arguments"]]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _send(signals: list[tuple[float, int]], child: int) -> None:
    """Send them as long as it lives."""
    descriptor = os.pidfd_open(child)
    try:
        for seconds, number in signals:
            if select.select([descriptor], [], [], seconds)[0]:
                return
            signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


def main() -> None:
    """Fork a job per line of standard input; its exit code goes to standard output."""
    import crowdlayer.job  # noqa: F401  paid once

    for line in sys.stdin:
        order = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # the job's: it listens a moment later than it is there
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        else:
            code = 1
            try:
                _job(order)
                code = 0
            finally:
                os._exit(code)
        _send(order["signals"], child)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
