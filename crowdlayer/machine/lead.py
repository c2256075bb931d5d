"""The first process of a node, among the others of the run: it prepares, it publishes, and it says why it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from ..errors import CrowdlayerError, InterruptedRunError, PeerError
from .last_words import LastWords
from .launch import Launch, hosts_the_store
from .meeting import BEAT, PARTING, PUBLISHED, Meeting, answers


class Lead:
    """A node's first process: until it is `ready` with the node's data, it gives signs of life to all who wait.

    So does the run's first while it publishes, and the others stay until it has. Where one fails all end, for its
    reason.
    """

    def __init__(self, launch: Launch, timeout: float) -> None:
        self._launch = launch
        self._timeout = timeout
        self._among_others = launch.n_nodes > 1 or launch.peers is not None
        self._busy = True
        self._over = threading.Event()
        self._meeting: Meeting | None = None
        self._reason: LastWords | None = None

    def __enter__(self) -> Lead:
        if self._among_others:
            if hosts_the_store(self._launch):
                self._meeting = Meeting.host(self._launch, self._timeout)
            threading.Thread(target=self._attend, name="signs of life", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is not None and self._among_others:
            self._account_for(error)

    def reason(self) -> LastWords | None:
        """Why another has ended, if one has failed."""
        return self._reason

    def ready(self) -> Meeting:
        """End the preparations, and meet the others.

        Raises:
            EndedError, InterruptedRunError: another has failed meanwhile; with its reason.
            PeerError: the first is not there.
        """
        self._busy = False
        if self._reason is not None:
            raise self._reason.of_another()
        if self._meeting is None:
            come = Meeting.host if hosts_the_store(self._launch) else Meeting.join
            self._meeting = come(self._launch, self._timeout)
        return self._meeting

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """What is inside is the end of the run, which its first process puts; the others stay until it has.

        Raises:
            EndedError, InterruptedRunError: it has failed; with its reason.
            PeerError: it is gone, or silent.
        """
        if not self._among_others:
            yield
            return
        meeting = self.ready()
        if not self._launch.publishes:
            yield
            self._over.set()
            meeting.published(self._launch.attendance)
            return
        self._busy = True
        yield
        self._over.set()
        with suppress(CrowdlayerError):  # all is put: who is gone, or has failed, will find it done
            meeting.tell(PUBLISHED, "")
            meeting.part(self._launch.attendance, hosts_the_store(self._launch), PARTING)

    def _account_for(self, error: BaseException) -> None:
        meeting = self._meeting
        if meeting is None and not isinstance(error, PeerError):  # who is prepared, and has come to nobody, knows why
            with suppress(PeerError):
                meeting = Meeting.join(self._launch, PARTING)
        if meeting is not None:
            meeting.account_for(error)
        if self._reason is not None and isinstance(error, PeerError):  # told before the store went
            raise self._reason.of_another() from error

    def _attend(self) -> None:
        """Give signs of life while there is something to do that others wait for, and hear of those who fail."""
        meeting = self._meeting
        with suppress(InterruptedRunError):
            while self._reason is None and not self._over.wait(BEAT):
                try:
                    if meeting is None and answers(self._launch.address, self._launch.port or 0):
                        meeting = Meeting.join(self._launch, self._timeout)
                    if meeting is not None:
                        self._reason = meeting.reason()
                        if self._busy:
                            meeting.sign()
                except PeerError:  # who needs the first will say so; it may be started again, and come anew
                    meeting = None
