"""Work on a second stream of a GPU, for which nothing waits until it must."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

UNDER_WAY = 2
"""Pieces of work that may be under way beside the rest: what one was given takes memory until it is over."""


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

    def ready(self) -> torch.cuda.Event | None:
        """When all is there that the current stream has begun until now."""
        return None if self.stream is None else torch.cuda.current_stream(self.stream.device).record_event()

    def run(self, work: Callable[[], T], *given: Tensor, since: torch.cuda.Event | None = None) -> T:
        """Begin when it is ready `since` then, or now; one piece of work after the other.

        What it is given stays until both that stream and the step's have waited for it: its memory would go to others
        else.
        """
        if self.stream is None:
            return work()
        while len(self._under_way) >= UNDER_WAY:
            self._wait()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_event(since or current.record_event())
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


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
