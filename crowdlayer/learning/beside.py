"""Work on further streams of a GPU, for which nothing waits until it must: gradients of weights, and their steps."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")

UNDER_WAY = 2
"""Pieces of work that may be under way beside the rest: what one was given takes memory until it is over."""
ENOUGH = 1 << 15
"""So many numbers are moved together: more would be late, and the last ones are waited for."""


class Beside:
    """A second stream of a GPU; on another device work is done when it comes."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _stream(device)
        self._main: torch.cuda.Stream | None = None
        self._under_way: deque[tuple[torch.cuda.Stream, torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def begin(self) -> None:
        """A step begins, on the current stream; what an earlier one has begun and not ended has failed."""
        self._under_way.clear()
        if self.stream is not None:
            self._main = torch.cuda.current_stream(self.stream.device)

    def run(self, work: Callable[[], T], *given: Tensor) -> T:
        """Begin when all is there that the current stream has begun; one piece of work after the other.

        What it is given stays until both that stream and the step's have waited for it: its memory would go to others
        else.
        """
        if self.stream is None:
            return work()
        while len(self._under_way) >= UNDER_WAY:
            self._wait()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            done = work()
            self._under_way.append((current, self.stream.record_event(), given))
        return done

    def join(self) -> None:
        """Have the step's stream, and those that began it, wait for what was begun."""
        while self._under_way:
            self._wait()

    def _wait(self) -> None:
        current, event, _ = self._under_way.popleft()
        current.wait_event(event)
        if self._main is not None and self._main != current:
            self._main.wait_event(event)


class Moving:
    """An optimiser's steps for weights of its first group, each when its gradient is there, beside all else.

    The optimiser itself moves what has not been taken from it, which alone has a gradient when its step comes. A
    recording of these steps reads the rate from the device.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._own = copy.copy(optimizer)
        self._rate = torch.zeros((), device=device)
        self._followed: float | None = None
        self._stream = _stream(device)
        self._waiting: list[tuple[nn.Parameter, Tensor]] = []
        self._moved: list[Tensor] = []

    def follow(self) -> None:
        """Take over the optimiser's rate, for the next step; one that is recorded cannot look for itself."""
        rate = float(self._optimizer.param_groups[0]["lr"])
        if rate != self._followed:
            self._rate.fill_(rate)
            self._followed = rate

    def take(self, weight: nn.Parameter, gradient: Tensor, found: Beside) -> None:
        """Move the weight by this gradient, which is the last thing that was begun there."""
        self._waiting.append((weight, gradient))
        if sum(weight.numel() for weight, _ in self._waiting) >= ENOUGH:
            self._move(found)

    def finish(self, found: Beside) -> None:
        """Move what is left, and have the current stream wait for it."""
        if self._waiting:
            self._move(found)
        if self._stream is not None and self._moved:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self.forget()

    def forget(self) -> None:
        """Move nothing that waits: whoever gave it has failed."""
        self._waiting, self._moved = [], []

    def _move(self, found: Beside) -> None:
        weights, gradients = zip(*self._waiting, strict=True)
        self._waiting = []
        self._moved += gradients  # whose memory is of the stream on which they were found
        if self._stream is not None:
            assert found.stream is not None
            self._stream.wait_stream(found.stream)
        with torch.cuda.stream(self._stream):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            torch._foreach_copy_([weight.grad for weight in weights], gradients)
            self._step(list(weights))
            for weight in weights:
                weight.grad = None

    def _step(self, weights: list[nn.Parameter]) -> None:
        group = self._optimizer.param_groups[0] | {"params": weights, "lr": self._rate}
        if "capturable" in group:  # Adam would warn of what it is not
            group["capturable"] = self._stream is not None and torch.cuda.is_current_stream_capturing()
        self._own.param_groups = [group]
        self._own.state = self._optimizer.state  # a checkpoint may have brought another
        self._own.step()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
