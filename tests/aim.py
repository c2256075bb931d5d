"""A signal at the very moment at which a job calls one of its functions.

Python's profiler is told of every call, in every thread, and changes none.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Aim:
    """At the call of `function`, a qualified name, for the `count`-th time in the process of this `rank`.

    `rank`: "" for the job's own process. `group`: the signal goes to all of the job's processes, else to the first
    alone, as PID 1 of a container gets it. `own`: to the process itself. `twice`: another comes with it.
    """

    function: str
    count: int = 1
    rank: str = ""
    group: bool = False
    twice: bool = False
    own: bool = False

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables by which a job's processes take aim; `folder` is for a file that Python runs at its start."""
        (folder / "sitecustomize.py").write_text("from tests import aim\naim.take()\n")
        return {
            "PYTHONPATH": f"{folder}:{ROOT}",
            "AIM": " ".join(
                map(str, (self.function, self.count, self.rank or "-", int(self.group), int(self.twice), int(self.own)))
            ),
        }


def take() -> None:
    """Take the aim that the environment asks for, if it is at this process."""
    if "AIM" not in os.environ:
        return
    function, count, rank, group, twice, own = os.environ["AIM"].split()
    if rank != os.environ.get("RANK", "-"):
        return
    left, lock, name = int(count), threading.Lock(), function.rpartition(".")[2]
    target = os.getpid() if rank == "-" or int(own) else os.getppid()

    def called(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        code = frame.f_code
        if event != "call" or code.co_name != name or code.co_qualname != function:
            return
        with lock:
            left -= 1
            if left != 0:
                return
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the first would end this before the second
        for number in SIGNALS[: 1 + int(twice)]:
            if int(group):
                os.killpg(os.getpgrp(), number)
            else:
                os.kill(target, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    threading.setprofile(called)
    sys.setprofile(called)
