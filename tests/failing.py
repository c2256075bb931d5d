"""The n-th write, flush, rename, step or sending of a job fails, or is its last: done to the job from outside its code.

The order is a variable of the job's environment, `FAILING="write 17 ENOSPC /a/log"`: what, which, how and a file that
remembers it. What: write (of a file), fsync, rename, link, send (to a store), step (of an optimiser), evaluation (of
some images). How: the name of an errno or of a signal.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]  # typeshed has none
import builtins
import errno
import http.client
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")

POINTS = ("write", "fsync", "rename", "link")
AT_ONCE = 2**20
"""Bytes that torch writes at once: its own stream makes a write of every tensor, thousands in a job."""


class _Failing:
    def __init__(self, order: str) -> None:
        self.what, number, self.how, self.log = order.split()
        self.number = int(number)
        self._met = 0
        self._lock = threading.Lock()
        self._flushed: set[tuple[int, int]] = set()

    def meet(self, what: str) -> None:
        """Fail, or end, if it is this one's turn."""
        if what != self.what:
            return
        with self._lock:
            self._met += 1
            if self._met != self.number:
                return
        self.note(f"failed {what} {self.number}")
        if self.how.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.how])
            if self.how == "SIGKILL":
                threading.Event().wait()  # some kernels let a killed thread go on for a while
        else:
            code = getattr(errno, self.how)
            raise OSError(code, os.strerror(code))

    def note(self, line: str) -> None:
        with io.FileIO(self.log, "a") as file:
            file.write(f"{line}\n".encode())

    def met(self, what: str, call: Callable[..., R]) -> Callable[..., R]:
        def counted(*arguments: Any, **named: Any) -> R:
            self.meet(what)
            return call(*arguments, **named)

        return counted

    def flushed(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._flushed.add((status.st_dev, status.st_ino))

    def renamed(self, source: Any, target: Any) -> None:
        """Remember what gets a name in the output that may outlive its bytes."""
        status = Path(source).stat()
        output = os.environ.get("CROWDLAYER_OUTPUT", "s3://")
        if Path(target).is_relative_to(output) and (status.st_dev, status.st_ino) not in self._flushed:
            self.note(f"not flushed: {target}")


class _Gathered:
    """A file whose writes are few and go through os.write."""

    def __init__(self, path: str) -> None:
        self._file = _pyio.FileIO(path, "w")
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        while len(self._held) >= AT_ONCE:
            self._flush()
        return len(data)

    def _flush(self) -> None:
        written = self._file.write(self._held[:AT_ONCE])
        del self._held[:written]

    def close(self) -> None:
        try:
            while self._held:
                self._flush()
        finally:
            self._file.close()


def install(order: str) -> None:
    """Have the rest of this process's life go as `order` says."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    failing = _Failing(order)
    fsync, replace, open_, writer = os.fsync, os.replace, io.open, torch._C.PyTorchFileWriter

    def flushing(descriptor: int) -> None:
        failing.meet("fsync")
        fsync(descriptor)
        failing.flushed(descriptor)

    def replacing(source: Any, target: Any, **named: Any) -> None:
        failing.meet("rename")
        failing.renamed(source, target)
        replace(source, target, **named)

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        """A file to write goes through Python's own io, which calls os.write."""
        own = set(mode) & set("wax+") and file not in (1, 2)
        return (_pyio.open if own else open_)(file, mode, *arguments, **named)

    class WrittenByTorch(writer):  # type: ignore[misc, valid-type]
        def __init__(self, file: Any, *arguments: Any, **named: Any) -> None:
            self.gathered = _Gathered(file) if isinstance(file, str) else None
            super().__init__(self.gathered or file, *arguments, **named)

        def write_end_of_file(self) -> None:
            super().write_end_of_file()
            if self.gathered is not None:
                self.gathered.close()

    os.write = failing.met("write", os.write)
    os.fsync, os.replace = flushing, replacing  # type: ignore[assignment]
    os.rename, os.link = failing.met("rename", os.rename), failing.met("link", os.link)
    io.open = builtins.open = opening
    torch._C.PyTorchFileWriter = WrittenByTorch  # type: ignore[misc, assignment]
    http.client.HTTPConnection.send = failing.met("send", http.client.HTTPConnection.send)  # type: ignore[method-assign]
    register_optimizer_step_post_hook(lambda *_: failing.meet("step"))
    if failing.what == "evaluation":
        torch.inference_mode.__enter__ = failing.met("evaluation", torch.inference_mode.__enter__)  # type: ignore[method-assign]
