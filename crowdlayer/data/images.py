"""Decoded images and answers → batches on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..answers import Answers
from ..errors import SettingsError
from ..machine.processes import Processes
from .pixels import DRAWS, affine, augment, on_device, sent

T = TypeVar("T")

STREAM_ORDER, STREAM_AUGMENT, STREAM_DROPOUT = 1, 2, 3
"""Names of the random streams, so that no two of one epoch share their draws."""

RESIDENT = 0.25
"""The share of a GPU's free memory that the images of a split may take; the rest is the network's."""


class Rows(Protocol):
    """Images (n, size, size, 3) uint8 or their features (n, …) float32, by row: a tensor, or what acts like one."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Tensor | slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Chosen:
    """The rows at these places (n,) of others, which are no copies."""

    rows: Rows
    at: Tensor

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, wanted: Tensor | slice, /) -> Tensor:
        return self.rows[self.at[wanted]]


def chosen(rows: Rows, at: Tensor) -> Rows:
    """The rows at these places (n,): copies where they lie on a device as a whole."""
    return rows[at.to(rows.device)] if isinstance(rows, Tensor) else Chosen(rows, at)


def stream_seed(seed: int, epoch: int, purpose: int, *place: int) -> int:
    """The seed of one purpose in one epoch, or at a place in it (step, process): the same after a resume."""
    sequence = np.random.SeedSequence((seed, epoch, purpose, *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """The random stream of one purpose in one epoch."""
    return torch.Generator().manual_seed(stream_seed(seed, epoch, purpose))


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch, and how many tasks and answers all processes have of it.

    `rows` (tasks, …): bytes (size, size, 3) as they are held, images that were augmented, or features. `task` (rows of
    `rows`), `worker`, `label`, each (answers,). No batch of the same loader has more than `most_answers`; they have
    `mean_answers`.
    """

    rows: Tensor
    task: Tensor
    worker: Tensor
    label: Tensor
    n_tasks: int
    n_answers: int
    most_answers: int
    mean_answers: float

    @cached_property
    def images(self) -> Tensor:
        """What a network takes: (tasks, 3, size, size) normalised, or features."""
        return on_device(self.rows, self.rows.device)


BLOCK, FIRST = 32, 4
"""So many batches' answers are looked up and sent together: alone each transfer takes as long as a layer. Of an epoch's
first ones fewer, for which the device waits."""


class CrowdLoader:
    """The batches of one epoch after another: every task once, in an order that SEED and the epoch alone decide.

    An epoch has ceil(tasks / batch_size) batches of as equal a size as can be, so that none is left with the one
    image that batch norm cannot do. Of several processes each gets a share of every batch.
    """

    def __init__(
        self,
        images: Rows,
        answers: Answers,
        batch_size: int,
        seed: int,
        augmented: bool,
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008  frozen
        aspect: Tensor | None = None,
    ) -> None:
        """`images`: (tasks, size, size, 3) uint8, row i the image of the answers' task i.

        Before they were made square they had an `aspect` (tasks,) of width / height, if they were not square already.

        Raises:
            SettingsError: a batch has not a task for every process.
        """
        if len(images) // -(-len(images) // batch_size) < processes.count:
            raise SettingsError(
                f"BATCH_SIZE: must have a task for each of {processes.count} processes in every step, "
                f"got {batch_size} for {len(images)} tasks"
            )
        self.dataset = images
        self.answers = answers
        self.batch_size = batch_size
        self.seed = seed
        self.augmented = augmented
        self.device = device
        self.processes = processes
        self.aspect = torch.ones(len(images)) if aspect is None else aspect
        self.epoch = 0
        self._starts, self._worker, self._label = (
            torch.from_numpy(part) for part in (answers.starts_at, answers.worker, answers.label)
        )
        largest = math.ceil(math.ceil(len(images) / len(self)) / processes.count)
        self._most_answers = int(self._starts.diff().topk(largest).values.sum())
        self._mean_answers = len(answers.task) / (len(self) * processes.count)

    def with_answers(self, answers: Answers) -> CrowdLoader:
        """A loader of the same images in the same order, with other answers to them."""
        given = self.dataset, answers, self.batch_size, self.seed, self.augmented, self.device
        return CrowdLoader(*given, self.processes, self.aspect)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch; the next iteration is the next epoch."""
        self.epoch += 1
        return self.batches(self.epoch - 1)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 0), from the batch `first` on."""
        made = self._batches(epoch, first)
        return made if at_hand(self.dataset, self.device) else ahead(made)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        order = torch.randperm(len(self.dataset), generator=stream(self.seed, epoch, STREAM_ORDER))
        theta = None
        if self.augmented:
            noise = stream(self.seed, epoch, STREAM_AUGMENT)
            theta = affine(torch.rand(len(self.dataset), DRAWS, generator=noise).float(), self.aspect)
        batches = order.tensor_split(len(self))[first:]
        edges = sorted({0, *range(FIRST, len(batches), BLOCK), len(batches)})
        for at, end in itertools.pairwise(edges):
            yield from self._block(batches[at:end], theta)

    def _block(self, batches: Sequence[Tensor], theta: Tensor | None) -> Iterator[Batch]:
        """These batches, each (tasks,) of all processes; `theta` (images, 2, 3), where they are augmented."""
        shares = [self.processes.mine(batch) for batch in batches]
        rows, n_tasks = torch.cat(shares), lengths(shares)
        count = self._count(rows)
        place = torch.arange(len(rows)) - torch.repeat_interleave(n_tasks.cumsum(0) - n_tasks, n_tasks)  # in its batch
        flat = torch.repeat_interleave(self._starts[rows] - (count.cumsum(0) - count), count)
        flat += torch.arange(len(flat))
        parts = (torch.repeat_interleave(place, count), self._worker[flat], self._label[flat], rows)
        *answers, there = torch.split(sent(torch.cat(parts), self.device), [len(part) for part in parts])
        n_answers = sums(count, n_tasks).tolist()
        of_batches = zip(*(torch.split(part, n_answers) for part in answers), strict=True)
        everyones = sums(self._count(torch.cat(list(batches))), lengths(batches)).tolist()
        chosen = torch.split(there, n_tasks.tolist()) if on(self.dataset, self.device) else shares
        thetas = None if theta is None else torch.split(sent(theta[rows], self.device), n_tasks.tolist())
        for i, (task, worker, label) in enumerate(of_batches):
            rows = sent(self.dataset[chosen[i]], self.device)
            if thetas is not None:
                rows = augment(on_device(rows, self.device), thetas[i])
            yield Batch(
                rows, task, worker, label, len(batches[i]), everyones[i], self._most_answers, self._mean_answers
            )

    def _count(self, rows: Tensor) -> Tensor:
        """How many answers each of these tasks has."""
        return self._starts[rows + 1] - self._starts[rows]


def lengths(parts: Sequence[Tensor]) -> Tensor:
    """How long each part is."""
    return torch.tensor([len(part) for part in parts])


def sums(numbers: Tensor, lengths: Tensor) -> Tensor:
    """Of each part of the numbers, which have these lengths."""
    return F.pad(numbers.cumsum(0), (1, 0))[F.pad(lengths.cumsum(0), (1, 0))].diff()


class ImageLoader:
    """Batches of images with their labels, in order, each image once: for evaluation; a share for each process."""

    def __init__(
        self,
        images: Rows,
        labels: Tensor | None,
        batch_size: int,
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008  frozen
    ) -> None:
        """`labels`: (images,), -1 for all when there are none."""
        self.dataset = images
        self.labels = torch.full((len(images),), -1) if labels is None else labels
        self.batch_size = batch_size
        self.device = device
        mine = processes.mine(torch.arange(len(images)))
        self._rows = range(int(mine[0]), int(mine[-1]) + 1) if len(mine) else range(0)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, 3, size, size) float32 and (n,) each."""
        made = self._batches()
        return made if at_hand(self.dataset, self.device) else ahead(made)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in self._rows[:: self.batch_size]:
            rows = slice(first, min(first + self.batch_size, self._rows.stop))
            yield on_device(self.dataset[rows], self.device), sent(self.labels[rows], self.device)


def on(images: Rows, device: torch.device) -> bool:
    """Whether the images lie on the device; a process has one of a kind, and may call it by its kind alone."""
    return device.type == (images.device.type if isinstance(images, Tensor) else "cpu")


def at_hand(images: Rows, device: torch.device) -> bool:
    """Whether nothing is to wait for when a batch is gathered: neither a decoder nor the way to another device."""
    return on(images, device) and getattr(images, "all_held", True)


def ahead(batches: Iterator[T]) -> Generator[T, None, None]:
    """The same; each is made in a thread while the one before is in use."""
    # A thread has a stream of its own else, for which nobody would wait. It keeps this one: back on its own, which is
    # the first GPU's, the process of another GPU would take memory there.
    start = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        start = partial(torch.cuda.set_stream, torch.cuda.current_stream())
    with ThreadPoolExecutor(1, initializer=start) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def resident(images: Rows, device: torch.device) -> Rows:
    """The images on the device, where they take at most `RESIDENT` of its free memory; else as they are."""
    if device.type != "cuda" or not getattr(images, "all_held", True):
        return images
    one = images[:1]
    if len(images) * one.nbytes > RESIDENT * torch.cuda.mem_get_info(device)[0]:
        return images
    copy = torch.empty(len(images), *one.shape[1:], dtype=one.dtype, device=device)
    for first in range(0, len(images), 1024):
        copy[first : first + 1024] = images[first : first + 1024]
    return copy
