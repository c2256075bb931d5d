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
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from ..errors import InterruptedRunError, PeerError, one_line
from ..masking import without_secrets
from . import interruption
from .last_words import LastWords
from .launch import Launch, hosts_the_store

T = TypeVar("T")

LOOK = 0.1
"""Seconds between two looks."""
BEAT = 1.0
"""Seconds between two signs of life."""
PARTING = 10.0
"""Seconds that who has the store stays at the end for those who have only to hear why, or that it is the end.

So long who misses another waits to hear why; not longer, or one that is started again would meet those who are about
to go.
"""
PUBLISHED, FAILED = "published", "failed"


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
        self._launch = launch

    @classmethod
    def host(cls, launch: Launch, timeout: float) -> Meeting:
        """Have the store in this process, at the launch's port or any that is free; of one node, on this machine alone.

        Raises:
            PeerError: the port is not free.
        """
        port = launch.port or 0
        listener = None
        try:
            if launch.n_nodes == 1 and launch.peers is None:  # torch would listen on all interfaces
                with socket.create_server(("127.0.0.1", port)) as bound:
                    port, listener = bound.getsockname()[1], bound.detach()
            store = _store("127.0.0.1", port, timeout, host=True, listener=listener)
        except (dist.DistError, OSError) as error:
            raise PeerError(f"MASTER_PORT: must be free on the run's first node, {port} is not") from error
        return cls(store, timeout, launch)

    @classmethod
    def join(cls, launch: Launch, timeout: float) -> Meeting:
        """Come to the store, which may not be there yet.

        Raises:
            PeerError: it does not come, or does not answer.
        """
        address, port = launch.address, launch.port or 0
        deadline = time.monotonic() + timeout
        while not answers(address, port):
            if time.monotonic() > deadline:
                raise PeerError(f"{address}:{port}: the run's first process must answer within TIMEOUT={timeout:g} s")
            time.sleep(LOOK)
        with lost_peers():
            return cls(_store(address, port, timeout), timeout, launch)

    def sign(self) -> None:
        """Give a sign of life to those who wait."""
        with lost_peers():
            self.store.add("signs", 1)

    def tell(self, key: str, text: str) -> None:
        with lost_peers():
            self.store.set(key, text)

    def first_said(self, key: str, text: str) -> str:
        """What the first process has said under this key that came to it: `text` where it is this one."""
        with lost_peers():
            said: bytes = self.store.compare_set(key, "", text)
            return said.decode()

    def told(self, key: str) -> str:
        """What another process tells, once it does.

        Raises:
            EndedError, InterruptedRunError: another has ended; as everywhere here, its reason is that of who waits.
            PeerError: it is gone, or silent.
        """
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
                return self.first_said("door", "shut")
            return self.store.get("door").decode() if self.store.check(["door"]) else None

        with lost_peers():
            if self.store.add("here", 1) == count:
                self.first_said("door", "open")
        if self._wait(door, f"{count} processes") == "shut":
            heard = interruption.heard()
            raise InterruptedRunError(
                f"{'another process' if heard is None else heard.name}: the run was interrupted before it began"
            )

    def all_say(self, what: str, count: int, within: float) -> bool:
        """Whether all of `count` processes say this, which need not come here, within these seconds.

        For those that have failed in a step: their group may still wait for them in the middle of theirs.

        Raises:
            EndedError, InterruptedRunError: another has ended.
        """
        with lost_peers():
            self.store.add(what, 1)
        try:
            return self._wait(lambda: True if self.store.add(what, 0) == count else None, what, within)
        except PeerError:
            return False

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

    @contextmanager
    def accounted(self) -> Iterator[None]:
        """Who fails in here says why, as `account_for` has it."""
        try:
            yield
        except BaseException as error:
            self.account_for(error)
            raise

    def account_for(self, error: BaseException) -> None:
        """Tell the others why this process ends, or hear it from the one that it misses; the first reason told stays.

        Who has the store stays for a moment, until all have heard: without it nothing can be told.

        Raises:
            EndedError, InterruptedRunError: the reason of the one that is missed.
        """
        words = LastWords.of(error)
        stays = words.code != InterruptedRunError.exit_code  # whose grace is short
        try:
            if words.lost:
                self._wait(lambda: None, "a reason", PARTING)
            self._tell_reason(words)
        except PeerError:
            stays = False  # there is nothing to hear
        finally:
            self._leave(stays)

    def _tell_reason(self, words: LastWords) -> None:
        told = msgspec.json.encode(replace(words, line=without_secrets(words.line), by=self._launch.name)).decode()
        with suppress(InterruptedRunError), lost_peers():
            self.in_time(lambda: self.store.compare_set(FAILED, "", told), "it must be told", PARTING)

    def _leave(self, stays: bool) -> None:
        """Be counted as one that has failed, and hears nothing any more."""

        def left(more: int) -> int:
            return self.in_time(lambda: self.store.add("left", more), "the others must be counted", PARTING)

        over = time.monotonic() + PARTING
        with suppress(PeerError, InterruptedRunError), lost_peers():
            n = left(1)
            while stays and hosts_the_store(self._launch) and n < self._launch.attendance and time.monotonic() < over:
                time.sleep(LOOK)
                n = left(0)

    def in_time(self, do: Callable[[], T], must: str, within: float | None = None) -> T:
        """What that comes to; in a thread, for torch would wait longer, for a host that is cut off, and hear no signal.

        Raises:
            PeerError: it takes longer than that, or the time-out; with what `must` have been.
        """
        longest = self.timeout if within is None else within
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(do())
            except BaseException as error:  # to be raised where it was asked
                answer.set_exception(error)

        threading.Thread(target=ask, name=must, daemon=True).start()
        try:
            return answer.result(longest)
        except TimeoutError:
            raise PeerError(f"{must} within TIMEOUT={longest:g} s") from None

    def _wait(self, look: Callable[[], T | None], what: str, timeout: float | None = None) -> T:
        signs, since, longest = 0, time.monotonic(), self.timeout if timeout is None else timeout
        with lost_peers():
            while True:
                found, seen, failed = self.in_time(
                    lambda: (look(), self.store.add("signs", 0), self.reason()),
                    "the run's first process must answer",
                    longest,
                )
                if found is not None:
                    return found
                if failed is not None:
                    raise failed.of_another()
                if seen != signs:
                    signs, since = seen, time.monotonic()
                elif time.monotonic() - since > longest:
                    raise PeerError(f"{what}: must be there within TIMEOUT={longest:g} s of the last sign of life")
                time.sleep(LOOK)

    def reason(self) -> LastWords | None:
        """Why another has ended, if one has failed."""
        with lost_peers():
            if not self.store.check([FAILED]):
                return None
            return LastWords.told(self.store.get(FAILED))


def answers(address: str, port: int) -> bool:
    """Whether anybody is there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _store(address: str, port: int, timeout: float, host: bool = False, listener: int | None = None) -> TCPStore:
    return TCPStore(
        address,
        port,
        is_master=host,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
        master_listen_fd=listener,
    )
