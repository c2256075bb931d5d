"""Checkpoints on their way from this machine to the output, while training goes on."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import CrowdlayerError
from ..machine import interruption
from ..storage.files import disk_errors
from .checkpoint import Checkpoints
from .spool import indexes, parts_of

log = logging.getLogger(__name__)

POLL = 0.1
"""Seconds between looks into the spool."""
AGAIN = 60.0
"""Seconds after which a checkpoint that could not be put is tried again."""


class Uploads:
    """Puts the checkpoints of a spool to the output in a thread of its own; only the newest of those that wait.

    An upload that fails is said and tried again in a minute, or with the next checkpoint: a store that is away for an
    hour must not end a training of days. The last one, of `finish`, must go well.
    """

    def __init__(self, spool: Path, checkpoints: Checkpoints, background: bool) -> None:
        """`background`: put them as they come; else the newest alone, once the run is asked to stop."""
        self._spool = spool
        self._taken = spool / "taken"
        self._checkpoints = checkpoints
        self._over = threading.Event()
        self._done: str | None = None
        self._background = background
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def __enter__(self) -> Uploads:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._taken, ignore_errors=True)
        if self._done is not None and self._done == self._newest():
            shutil.rmtree(self._spool, ignore_errors=True)  # what is left there has not been put

    def stop(self) -> None:
        """No upload begins after this; one under way comes to its end."""
        self._over.set()
        self._thread.join()

    def finish(self) -> str | None:
        """Put the newest, unless that was done; the name of its index, None where there is none."""
        self.stop()
        self._put()
        return self._done

    def _work(self) -> None:
        while not self._over.wait(POLL):
            if not self._background and interruption.heard() is None:
                continue  # what the run does before it ends may take longer than the grace
            waiting = None
            try:
                waiting = self._newest()
                self._put()
            except CrowdlayerError as error:
                log.warning("checkpoint %s could not be put, it will be tried again: %s", waiting, error)
                again = time.monotonic() + AGAIN
                while not self._over.wait(POLL) and time.monotonic() < again and not self._has_other_than(waiting):
                    pass

    def _has_other_than(self, waiting: str | None) -> bool:
        """Whether another checkpoint has come; a disk that cannot tell it now is asked again."""
        with suppress(CrowdlayerError):
            return self._newest() != waiting
        return False

    def _put(self) -> None:
        newest = self._newest()
        if newest is not None and newest != self._done and self._take(newest):
            self._checkpoints.put(self._taken, newest)
            self._done = newest

    def _take(self, newest: str) -> bool:
        """Give the checkpoint names that training does not remove; False where it just has removed the first."""
        with disk_errors(str(self._taken)):
            shutil.rmtree(self._taken, ignore_errors=True)
            self._taken.mkdir()
            try:
                # two parts that say the same are one file
                for file in {newest, *(file for file, _ in parts_of(self._spool / newest))}:
                    _second_name(self._spool / file, self._taken / file)
            except FileNotFoundError:
                return False
        return True

    def _newest(self) -> str | None:
        return next(reversed(indexes(self._spool)), None)


def _second_name(file: Path, name: Path) -> None:
    """The same file under another name, or a copy where the file system has no such names."""
    try:
        name.hardlink_to(file)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, name)
