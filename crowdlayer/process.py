"""One training process of several: what `supervisor` starts, with the folder in which its plan lies."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import InterruptedRunError
from .machine import interruption
from .machine.last_words import LastWords, ending
from .machine.launch import Launch, Peers, recognise
from .machine.supervisor import live
from .streams import say


def main() -> None:
    """Train by the plan in the folder that the first argument names; the second is the supervisor. Never returns."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the supervisor
    if os.getppid() != int(sys.argv[2]):  # which was killed before that
        os._exit(InterruptedRunError.exit_code)
    folder, launch = Path(sys.argv[1]), recognise()

    def leave(line: str, code: int) -> int:
        LastWords(line, code).write(folder, _peers(launch).rank)
        return code

    os._exit(_code(folder, launch, leave))  # torch's teardown can take seconds of the grace


def _code(folder: Path, launch: Launch, leave: Callable[[str, int], int]) -> int:
    def work() -> None:
        interruption.listen(leave)  # one may have come already
        live(folder, _peers(launch).rank)
        _train(folder, launch)

    words, trace = ending(work)
    if words is None:
        return 0
    if trace:
        _show(words.line, trace)
    words.write(folder, _peers(launch).rank)
    logging.shutdown()
    return words.code


def _show(line: str, trace: str) -> None:
    from . import logs  # which may not have started

    if logs.in_json():
        logging.getLogger(__name__).error(line, extra={"traceback": trace})
    else:
        say(trace, sys.stderr)


def _train(folder: Path, launch: Launch) -> None:
    from . import logs  # after signals are heard: torch takes seconds
    from .learning.experiment import Phases
    from .machine.meeting import Meeting
    from .storage.handover import hand, take
    from .training import PLAN, TRAINED, Plan, train_together

    plan, peers = take(folder / PLAN, Plan), _peers(launch)
    interruption.begin(plan.settings.grace)
    logs.start(plan.settings.log_format)
    trained = train_together(plan, Phases(), Meeting.join(launch, plan.settings.timeout), launch, peers)
    if peers.rank == 0:
        hand(trained, folder / TRAINED)


def _peers(launch: Launch) -> Peers:
    assert launch.peers is not None  # the supervisor sets torch's variables
    return launch.peers
