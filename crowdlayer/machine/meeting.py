"""Where the processes of a run meet before they are a group: a store at the run's first.

Whoever waits does it here in Python, a look at a time: inside torch it would hear no signal. And it waits no longer
than the time-out after the last sign of life of a process that prepares its node's data, however long that takes.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from ..errors import InterruptedRunError, PeerError, one_line
from . import interruption
from .launch import Launch, hosts_the_store

T = TypeVar("T")

LOOK = 0.1
"""Seconds between two looks."""
BEAT = 1.0
"""Seconds between two signs of life."""
PARTING = 10.0
"""Seconds that who has the store stays at the end for those who have only to hear that it is the end."""
PUBLISHED = "published"


@contextmanager
def lost_peers() -> Iterator[None]:
    """Tell what torch says when another process is gone, or silent for longer than the time-out, in one line.

    Raises:
        PeerError: for torch's DistError, and for the RuntimeError of gloo, which has no type of its own.
        InterruptedRunError: this process was asked to stop; so was the other, which was quicker.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if (heard := interruption.heard()) is not None:
            raise InterruptedRunError(f"{heard.name}: the run was interrupted") from error
        said = re.sub(r"^\[\S*\] | This is typically.*", "", one_line(str(error)))  # places in its source, and advice
        raise PeerError(f"another process of the run is gone or silent: {said[:300]}") from error


class Meeting:
    """The store, as one process sees it."""

    def __init__(self, store: TCPStore, timeout: float, launch: Launch) -> None:
        """What other runs say there, and another attempt of this one, is not heard."""
        self.port: int = store.port
        self.store: Store = PrefixStore(f"crowdlayer/{launch.run}/{launch.attempt}", store)
        self.timeout = timeout

    @classmethod
    def host(cls, launch: Launch, timeout: float) -> Meeting:
        """Have the store in this process, at the launch's port or any that is free.

        Raises:
            PeerError: the port is not free.
        """
        return cls(_store("127.0.0.1", launch.port or 0, timeout, host=True), timeout, launch)

    @classmethod
    def join(cls, launch: Launch, timeout: float) -> Meeting:
        """Come to the store, which may not be there yet.

        Raises:
            PeerError: it does not come, or does not answer.
        """
        address, port = launch.address, launch.port or 0
        deadline = time.monotonic() + timeout
        while not _answers(address, port):
            if time.monotonic() > deadline:
                raise PeerError(f"{address}:{port}: the run's first process must answer within TIMEOUT={timeout:g} s")
            time.sleep(LOOK)
        return cls(_store(address, port, timeout), timeout, launch)

    def sign(self) -> None:
        """Give a sign of life to those who wait."""
        with lost_peers():
            self.store.add("signs", 1)

    def tell(self, key: str, text: str) -> None:
        with lost_peers():
            self.store.set(key, text)

    def told(self, key: str) -> str:
        """What another process tells, once it does."""
        return self._wait(lambda: self.store.get(key).decode() if self.store.check([key]) else None, key)

    def all_here(self, count: int) -> None:
        """Wait until `count` processes are here; with signals deferred.

        Either all pass or none: the last to come opens the door, the first to be asked to stop shuts it, and what was
        done first stays done.

        Raises:
            InterruptedRunError: it was shut.
        """

        def door() -> str | None:
            if interruption.heard() is not None:
                return turn("shut")
            return self.store.get("door").decode() if self.store.check(["door"]) else None

        def turn(way: str) -> str:
            turned: bytes = self.store.compare_set("door", "", way)
            return turned.decode()

        with lost_peers():
            if self.store.add("here", 1) == count:
                turn("open")
        if self._wait(door, f"{count} processes") == "shut":
            heard = interruption.heard()
            raise InterruptedRunError(
                f"{'another process' if heard is None else heard.name}: the run was interrupted before it began"
            )

    def part(self, count: int, host: bool, within: float | None = None) -> None:
        """Leave; who has the store goes last of `count`."""
        with lost_peers():
            self.store.add("gone", 1)
        if host:
            what = f"{count} processes to leave"
            self._wait(lambda: True if self.store.add("gone", 0) == count else None, what, within)

    def published(self, count: int) -> None:
        """Stay until the run's first of `count` has put the results: should it fail, all are needed once more.

        Raises:
            PeerError: it is gone, or silent.
        """
        self.told(PUBLISHED)
        self.part(count, host=False)

    def in_time(self, do: Callable[[], T], must: str) -> T:
        """What that comes to; in a thread, for torch would wait longer, for a host that is cut off, and hear no signal.

        Raises:
            PeerError: it takes longer than the time-out; with what `must` have been.
        """
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(do())
            except BaseException as error:  # to be raised where it was asked
                answer.set_exception(error)

        threading.Thread(target=ask, name=must, daemon=True).start()
        try:
            return answer.result(self.timeout)
        except TimeoutError:
            raise PeerError(f"{must} within TIMEOUT={self.timeout:g} s") from None

    def _wait(self, look: Callable[[], T | None], what: str, timeout: float | None = None) -> T:
        signs, since, longest = 0, time.monotonic(), self.timeout if timeout is None else timeout
        with lost_peers():
            while True:
                found, seen = self.in_time(
                    lambda: (look(), self.store.add("signs", 0)), "the run's first process must answer"
                )
                if found is not None:
                    return found
                if seen != signs:
                    signs, since = seen, time.monotonic()
                elif time.monotonic() - since > longest:
                    raise PeerError(f"{what}: must be there within TIMEOUT={longest:g} s of the last sign of life")
                time.sleep(LOOK)


class Lead:
    """A node's first process: until it is `ready` with the node's data, it gives signs of life to all who wait.

    So does the run's first while it publishes, and the others stay until it has.
    """

    def __init__(self, launch: Launch, timeout: float) -> None:
        self._launch = launch
        self._timeout = timeout
        self._count = launch.n_nodes if launch.peers is None else launch.peers.world
        self._among_others = launch.n_nodes > 1 or launch.peers is not None
        self._over = threading.Event()
        self._meeting: Meeting | None = None

    def __enter__(self) -> Lead:
        if self._among_others:
            if hosts_the_store(self._launch):
                self._meeting = Meeting.host(self._launch, self._timeout)
            self._begin_signs()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def ready(self) -> Meeting:
        """End the preparations, and meet the others.

        Raises:
            PeerError: the first is not there.
        """
        self._over.set()
        if self._meeting is None:
            come = Meeting.host if hosts_the_store(self._launch) else Meeting.join
            self._meeting = come(self._launch, self._timeout)
        return self._meeting

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """What is inside is the end of the run, which its first process puts; the others stay until it has.

        Raises:
            PeerError: the first is gone, or silent.
        """
        if not self._among_others:
            yield
            return
        meeting = self.ready()
        if not self._launch.publishes:
            yield
            meeting.published(self._count)
            return
        self._begin_signs()
        yield
        self._over.set()
        with suppress(PeerError):  # all is put: who is gone will find it done
            meeting.tell(PUBLISHED, "")
            meeting.part(self._count, hosts_the_store(self._launch), PARTING)

    def _begin_signs(self) -> None:
        self._over = threading.Event()
        threading.Thread(target=self._give_signs, args=(self._over,), name="signs of life", daemon=True).start()

    def _give_signs(self, over: threading.Event) -> None:
        meeting = self._meeting
        try:
            while not over.wait(BEAT):
                if meeting is None and _answers(self._launch.address, self._launch.port or 0):
                    meeting = Meeting.join(self._launch, self._timeout)
                if meeting is not None:
                    meeting.sign()
        except (PeerError, InterruptedRunError):
            pass  # who needs the other will say so


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _store(address: str, port: int, timeout: float, host: bool = False) -> TCPStore:
    with lost_peers():
        return TCPStore(address, port, is_master=host, wait_for_workers=False, timeout=timedelta(seconds=timeout))
