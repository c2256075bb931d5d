"""The gradients of a step as a CUDA graph: its kernels are recorded once, and then launched together.

A step of resnet18 on 64 images of 64 pixels is hundreds of kernels of some microseconds each. One by one the processor
takes several times as long to launch them as the GPU to run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import one_line
from .crowd_model import IGNORED
from .mixup import Mixed

log = logging.getLogger(__name__)

Gradients = Callable[[Mixed], tuple[Tensor, Tensor]]
"""Leaves gradients with the weights, but for those that it moves itself; gives logits (tasks, classes), a loss ()."""
TRIALS = 3
"""Steps of a shape that run kernel by kernel before one is recorded: libraries choose their algorithms meanwhile."""
PADDING = 4
"""Where a step could have more than so many times as many answers as the mean one has, room for them would cost."""


@dataclass
class _Recording:
    """What a graph reads, of how many answers, what it leaves, and the graph itself once there is one."""

    given: Mixed
    n_answers: int | None = None
    trials: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    result: tuple[Tensor, Tensor] | None = None
    gradients: list[Tensor | None] = field(default_factory=list)


class Graphs:
    """The same as `gradients`, from graphs of `recorded`: one for each shape of a step, all in the same memory.

    What it returns is overwritten by the next call, and so are the gradients. What cannot be recorded runs as it always
    did. Not for gradients of single rows: answers are padded to the most that a step has, and a worker whom a padding
    names would be moved.
    """

    def __init__(self, recorded: Gradients, gradients: Gradients, weights: Sequence[nn.Parameter]) -> None:
        self._recorded = recorded
        self._gradients = gradients
        self._weights = weights
        self._recordings: dict[tuple[torch.Size, int], _Recording] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._possible = True

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(recording.graph is not None for recording in self._recordings.values())

    def forget(self) -> None:
        """Give the memory back that the graphs hold."""
        self._release()
        self._recordings.clear()

    def _release(self) -> None:
        if len(self):
            torch.cuda.synchronize()  # one may be running
            for weight in self._weights:
                weight.grad = None  # which lies in the graphs' memory
        for recording in self._recordings.values():
            recording.graph = recording.result = None
            recording.gradients = []
        self._pool = None

    def give_up(self) -> bool:
        """The same, and have none from now on; whether there could be some until now."""
        possible, self._possible = self._possible, False
        self.forget()
        return possible

    def __call__(self, mixed: Mixed, most_answers: int, mean_answers: float) -> tuple[Tensor, Tensor]:
        """For a step of a loader whose steps have no more than `most_answers` answers, and `mean_answers`."""
        if not self._possible or most_answers > PADDING * mean_answers:
            return self._gradients(mixed)
        shape = mixed.images.shape, most_answers
        if shape not in self._recordings:
            self._recordings[shape] = _Recording(room(mixed, most_answers))
        recording = self._recordings[shape]
        fill(recording.given, mixed, mixed.n_answers == recording.n_answers)
        assert isinstance(mixed.n_answers, int)
        recording.n_answers = mixed.n_answers
        if recording.trials < TRIALS:
            recording.trials += 1
            self._release()  # a trial needs as much; the other shape is recorded again when it comes
            return self._recorded(recording.given)
        if recording.graph is None and not self._record(recording):
            return self._gradients(mixed)
        assert recording.graph is not None
        assert recording.result is not None
        recording.graph.replay()
        for weight, gradient in zip(self._weights, recording.gradients, strict=True):
            weight.grad = gradient
        return recording.result

    def _record(self, recording: _Recording) -> bool:
        """Record the step, which does not run it; whether that was possible."""
        device = recording.given.images.device
        stream = torch.cuda.current_stream(device)
        random = torch.cuda.default_generators[device.index]
        seed = random.initial_seed()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:  # one for all: what memory one has given back another may have, on the same stream
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # before what is beside
        try:
            # another thread may send the next images meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                recording.result = self._recorded(recording.given)
        except RuntimeError as error:  # out of memory is one, too
            log.info("no CUDA graph of this network, its kernels are launched one by one: %s", one_line(str(error)))
            # what was broken off leaves both in the midst of a recording
            torch.cuda.set_stream(stream)
            random.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
            random.manual_seed(seed)
            self.give_up()
            return False
        recording.gradients = [weight.grad for weight in self._weights]
        recording.graph = graph
        return True


def room(mixed: Mixed, n: int) -> Mixed:
    """Room for steps of this shape with at most `n` answers, to be filled."""

    def answers(part: Tensor) -> Tensor:
        return part.new_zeros(*part.shape[:-1], n)

    return Mixed(
        torch.empty_like(mixed.images),
        answers(mixed.task),
        answers(mixed.worker),
        answers(mixed.label),
        None if mixed.weight is None else answers(mixed.weight),
        mixed.n_tasks,
        torch.zeros((), device=mixed.images.device),
    )


def fill(given: Mixed, mixed: Mixed, as_many: bool = False) -> None:
    """Put a step into its `room`, which may have held one of `as_many` answers; those not there count for nothing."""
    n = len(mixed.task)
    assert isinstance(given.n_answers, Tensor)
    if not as_many:
        given.n_answers.fill_(max(mixed.n_answers, 1))
    given.images.copy_(mixed.images)
    rooms = [given.task[:n], given.worker[:, :n], given.label[:, :n]]
    torch._foreach_copy_(rooms, [mixed.task, mixed.worker, mixed.label])
    given.label[:, n:] = IGNORED
    if given.weight is not None and mixed.weight is not None:
        given.weight[:n] = mixed.weight
