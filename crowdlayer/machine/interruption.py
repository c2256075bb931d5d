"""Signals that ask the run to stop: heard once, answered at a good moment, and never later than the grace.

Before the work begins the process ends at once: nothing needs to be tidied up yet, and what is imported meanwhile
drops exceptions (torch's C code imports numpy, which then can never be imported again). Outside training the answer is
an exception, so that everything is tidied up on the way out. In training it is a flag that the loop looks at between
two steps, because all processes must stop at the same one. In either case the process is gone when the grace is over,
whatever it is doing then. Nothing here is imported that takes time.

An exception that comes where Python can have none, as in the callback of a weak reference, is dropped: it comes again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from ..errors import InterruptedRunError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class _State:
    """Signals belong to the process, and so does this."""

    heard: signal.Signals | None = None
    deadline: float = 0.0
    begun: bool = False
    deferred: bool = False
    dropped: bool = False
    grace: float = 25.0
    last: Callable[[str, int], int] = lambda line, code: code


_state = _State()


def listen(last: Callable[[str, int], int]) -> None:
    """Hear signals from now on; `last` says a line, and gives an exit code back, when the process must `leave`."""
    _state.last = last
    _state.begun = _state.deferred = False
    sys.unraisablehook = _drop
    for number in SIGNALS:
        signal.signal(number, _hear)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # who started us may have held them back until now


def begin(grace: float) -> None:
    """The work begins; all that takes time to import is there.

    Args:
        grace: seconds that the process may take from the first signal to its end.
    """
    _state.grace = grace
    _state.begun = True


def over() -> None:
    """The work has ended, whatever it came to: a signal that comes now has the grace alone to say something else.

    Raises:
        InterruptedRunError: one comes at this very moment.
    """
    _state.begun = True  # or the process would end at once
    _state.deferred = True


def heard() -> signal.Signals | None:
    """The signal that asked the run to stop."""
    return _state.heard


def nearly_over(share: float) -> bool:
    """Whether less than this share of the grace is left."""
    return _state.heard is not None and _state.deadline - time.monotonic() < share * _state.grace


@contextmanager
def deferred() -> Iterator[None]:
    """Let a signal set a flag alone; what is inside looks at `heard`. What it left unanswered is answered after it.

    Raises:
        InterruptedRunError: a signal came, and what is inside has gone on to its end.
    """
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    if _state.heard is not None:
        raise _interrupted()


def _interrupted() -> InterruptedRunError:
    assert _state.heard is not None
    return InterruptedRunError(f"{_state.heard.name}: the run was interrupted")


def _hear(number: int, frame: FrameType | None) -> None:
    if _state.dropped:
        _state.dropped = False
        if not _state.deferred:
            raise _interrupted()
    if _state.heard is not None:
        return  # once is enough, and the way out must not be interrupted
    _state.heard = signal.Signals(number)
    _state.deadline = time.monotonic() + _state.grace
    timer = threading.Timer(_state.grace if _state.begun else 0, _end, (_state.begun,))
    timer.daemon = True
    timer.start()
    if _state.begun and not _state.deferred:
        raise _interrupted()


def _drop(unraisable: sys.UnraisableHookArgs) -> None:
    """Of an exception that goes nowhere: ours comes again in a moment, any other is printed."""
    if _state.heard is None or not isinstance(unraisable.exc_value, InterruptedRunError):
        sys.__unraisablehook__(unraisable)
        return
    _state.dropped = True
    again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, _state.heard))
    again.daemon = True
    again.start()


def _end(begun: bool) -> None:
    late = f", and did not stop within GRACE={_state.grace:g} seconds" if begun else ""
    leave(f"{_interrupted()}{late}", InterruptedRunError.exit_code)


def leave(line: str, code: int) -> NoReturn:
    """End the process, whatever its threads are doing, and whether or not anybody reads its last line."""
    unread = threading.Timer(1, os._exit, (code,))
    unread.daemon = True
    unread.start()
    os._exit(_state.last(line, code))
