"""A process that makes no progress shows where it hangs, and ends."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .interruption import leave

LOOK = 1.0
"""Seconds between two looks."""
LAST_RESORT = 60.0
"""Seconds after which the interpreter's own timer ends a process whose every Python thread is held up.

It knows no suspension, and takes one that was longer than both times together for such a process.
"""


class Watchdog:
    """Ends the process when nobody has called `progress` for `timeout` seconds, with the stacks of all threads."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._last = time.monotonic()
        self._over = threading.Event()

    def progress(self) -> None:
        """Something has been done."""
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while this is open."""
        self.progress()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while (left := self._last + self._timeout - time.monotonic()) > 0:
            # Needs neither the lock of the interpreter nor this thread; put off as long as there is progress.
            faulthandler.dump_traceback_later(left + LAST_RESORT, exit=True)
            asked = time.monotonic()
            if self._over.wait(min(left, LOOK)):
                return
            self._last += overslept(asked, min(left, LOOK))
        faulthandler.dump_traceback(all_threads=True)
        leave(f"a fault of the program: no progress for TIMEOUT={self._timeout:g} seconds, stacks above", 70)


def overslept(since: float, asked: float) -> float:
    """Seconds for which who has slept `since` then, and `asked` for so many, was suspended, as by `docker pause`."""
    late = time.monotonic() - since - asked
    return late if late > LOOK else 0.0
