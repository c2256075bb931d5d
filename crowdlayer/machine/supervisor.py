"""The training processes of a node: started, told of signals, ended together, and what they came to.

Why this and not torch's elastic agent? Tried in process (torch 2.14, `elastic_launch`, static rendezvous, two processes
that save for 2 s after a SIGTERM and end with 75): they had their grace, but all that comes out of the agent is
SignalException(sigval=15). Their exit codes are lost, and with them whether there is a checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess  # nosec B404
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import EndedError, InterruptedRunError, PeerError
from . import interruption
from .cpus import cpus
from .last_words import LastWords
from .launch import Launch, announced
from .watchdog import overslept

log = logging.getLogger(__name__)

BEAT = 1.0
"""Seconds between two signs of life of a process."""
POLL = 0.05
"""Seconds between looks at the processes."""
RESERVE = 0.25
"""Share of the grace that is kept for what follows the end of the processes: putting the checkpoint."""


def live(folder: Path, rank: int) -> None:
    """Give signs of life from now on, in a thread of its own: a process that is stopped gives none, nor can it end."""

    def beat() -> None:
        while True:
            with suppress(OSError):  # a disk that is away for a moment; for longer, and nobody knows of life here
                _sign_of_life(folder, rank).touch()
            time.sleep(BEAT)

    threading.Thread(target=beat, name="signs of life", daemon=True).start()


def _sign_of_life(folder: Path, rank: int) -> Path:
    return folder / f"alive-{rank}"


def supervise(
    module: str,
    folder: Path,
    n: int,
    launch: Launch,
    port: int,
    timeout: float,
    nccl: bool = False,
    reason: Callable[[], LastWords | None] = lambda: None,
) -> None:
    """Run the `main` of a module of this package in `n` processes of this node, until all have ended.

    Args:
        folder: where they leave their last words; their arguments are it and the id of this process.
        port: of the first node, where they meet; its supervisor has opened it already.
        timeout: seconds without a sign of life after which a process is taken for lost.
        nccl: whether that is how they speak to each other.
        reason: why another node has ended, once it has: then these end, too.

    Raises:
        InterruptedRunError: they were asked to stop, or one of them was.
        EndedError: one failed, here or on another node; with its line and its exit code.
        PeerError: one gave no sign of life, or misses another of the run.
    """
    home = str(Path(__file__).resolve().parents[2])
    program = f"import sys; sys.path.insert(0, {home!r}); from crowdlayer.{module} import main; main()"
    shared = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    shared |= announced(launch) | {
        "MASTER_ADDR": launch.address if launch.node else "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(launch.n_nodes * n),
        "LOCAL_WORLD_SIZE": str(n),
        "TORCHELASTIC_RUN_ID": launch.run,
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(cpus() // n, 1)))
    with interruption.deferred():
        # -P: no modules of the current folder's
        command = [sys.executable, "-P", "-c", program, str(folder), str(os.getpid())]
        gang = _Gang(command, n, launch.node * n, shared, folder, timeout, nccl, reason)
        try:
            gang.wait()
        finally:
            gang.kill()
        gang.judge()


class _Gang:
    """The processes, ranks `first` and on."""

    def __init__(
        self,
        command: list[str],
        n: int,
        first: int,
        shared: Mapping[str, str],
        folder: Path,
        timeout: float,
        nccl: bool,
        reason: Callable[[], LastWords | None],
    ) -> None:
        self._folder = folder
        self._timeout = timeout
        self._nccl = nccl
        self._reason = reason
        now = time.monotonic()
        self._lives = {first + i: (0.0, now) for i in range(n)}  # the last sign of life, and when it was seen
        # rank → exit code, below 0 for a signal, in the order of their ends; not of those that are killed here
        self._ended: dict[int, int] = {}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started the job may ignore it: then no end has a code
        signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)  # theirs until they listen: none is lost
        try:
            self._alive = {
                first + i: subprocess.Popen(  # our own interpreter and module  # noqa: S603  # nosec B603
                    command,
                    env={**shared, "RANK": str(first + i), "LOCAL_RANK": str(i)},
                    stdout=2,  # what libraries print there goes to the log
                )
                for i in range(n)
            }
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interruption.SIGNALS)

    def wait(self) -> None:
        """Until all have ended, or one of the run has failed, or little of the grace is left."""
        told, interrupted = False, InterruptedRunError.exit_code
        while self._alive:
            for rank, process in list(self._alive.items()):
                if (code := process.poll()) is not None:
                    del self._alive[rank]
                    self._ended[rank] = code
            if set(self._ended.values()) - {0, interrupted}:
                return
            if self._failed_elsewhere() is not None:
                return
            self._all_live()
            if not told and (interruption.heard() is not None or interrupted in self._ended.values()):
                told = True  # all of them: one may have been told alone
                for process in self._alive.values():
                    process.send_signal(signal.SIGTERM)
            if interruption.nearly_over(RESERVE):
                log.warning("%d processes have not stopped in time", len(self._alive))
                return
            asked = time.monotonic()
            time.sleep(POLL)
            suspended = overslept(asked, POLL)  # they were too, perhaps
            self._lives = {rank: (sign, seen + suspended) for rank, (sign, seen) in self._lives.items()}

    def _all_live(self) -> None:
        for rank in self._alive:
            path, (last, seen) = _sign_of_life(self._folder, rank), self._lives[rank]
            now, sign = time.monotonic(), path.stat().st_mtime if path.exists() else last
            if sign != last:
                self._lives[rank] = (sign, now)
            elif now - seen > self._timeout:
                raise PeerError(f"process {rank}: must give signs of life, gave none for TIMEOUT={self._timeout:g} s")

    def kill(self) -> None:
        """End those that are left: without the others they cannot go on, nor save."""
        for process in self._alive.values():
            process.kill()
        for process in self._alive.values():
            process.wait()

    def _failed_elsewhere(self) -> LastWords | None:
        """Another node's reason; not that it was interrupted: these save then."""
        words = self._reason()
        return None if words is None or words.code == InterruptedRunError.exit_code else words

    def _last_words(self, rank: int) -> LastWords | None:
        """What it has left; where NCCL misses another its watchdog aborts the process, which can leave none."""
        said = LastWords.read(self._folder, rank)
        if said is None and self._nccl and self._ended[rank] == -signal.SIGABRT:
            line = (
                f"process {rank}: NCCL has aborted it, as it does when another is gone or silent, or a GPU has failed"
            )
            return LastWords(line, PeerError.exit_code, lost=True)
        return said

    def judge(self) -> None:
        """Raise what the run came to, unless all went well."""
        interrupted = InterruptedRunError.exit_code
        words = {rank: self._last_words(rank) for rank in self._ended}
        lost = {rank for rank, said in words.items() if said is not None and said.lost}
        failed = [rank for rank, code in self._ended.items() if code not in (0, interrupted)]
        stopped = interrupted in self._ended.values()
        elsewhere = self._failed_elsewhere()
        if elsewhere is not None and (failed or self._alive) and lost.issuperset(failed):
            raise elsewhere.of_another()
        if failed and not (stopped and lost.issuperset(failed)):  # who missed another is not the cause
            rank = min(failed, key=lambda rank: rank in lost)
            said, code = words[rank], self._ended[rank]
            if said is not None:
                raise PeerError(said.line) if said.lost else EndedError(said.line, said.code)
            how = f"killed by {_name_of(-code)}" if code < 0 else f"ended with {code}"
            raise EndedError(f"process {rank}: must end by itself, was {how}", 128 - code if code < 0 else code)
        if stopped or self._alive:
            heard = interruption.heard()
            said_by_one = next((said.line for said in words.values() if said is not None), None)
            raise InterruptedRunError(said_by_one or f"{heard.name if heard else 'a signal'}: the run was interrupted")


def _name_of(number: int) -> str:
    """Of a signal; those for real-time programs have none."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
