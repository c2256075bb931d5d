"""Decoded images → batches, augmented and normalised on the device."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..answers import Answers
from ..errors import SettingsError
from ..machine.processes import Processes

T = TypeVar("T")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, per RGB channel in [0, 1]; peerannot's and torchvision's."""

STREAM_ORDER, STREAM_AUGMENT, STREAM_DROPOUT = 1, 2, 3
"""Names of the random streams, so that no two of one epoch share their draws."""

RESIDENT = 0.25
"""The share of a GPU's free memory that the images of a split may take; the rest is the network's."""


class Rows(Protocol):
    """Images (n, size, size, 3) uint8 or their features (n, …) float32, by row: a tensor, or what acts like one."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Tensor | slice, /) -> Tensor: ...


def stream_seed(seed: int, epoch: int, purpose: int, *place: int) -> int:
    """The seed of one purpose in one epoch, or at a place in it (step, process): the same after a resume."""
    sequence = np.random.SeedSequence((seed, epoch, purpose, *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """The random stream of one purpose in one epoch."""
    return torch.Generator().manual_seed(stream_seed(seed, epoch, purpose))


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """(n, size, size, 3) uint8 → (n, 3, size, size) float32 on `device`, in the order that its convolutions want.

    That is channels last on CUDA; on a CPU, where resnet18's step takes a quarter longer so, channels first.
    """
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    floats = images.to(device).permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
    return floats.div_(255).sub_(mean).div_(std)


def on_device(rows: Tensor, device: torch.device) -> Tensor:
    """What a network takes: images (n, size, size, 3) uint8 normalised, features (n, …) float32 as they are."""
    return normalise(rows, device) if rows.dtype == torch.uint8 else rows.to(device)


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Peerannot's augmentation by the batch: of shear, flip and random resized crop, each image gets one.

    Args:
        images: (n, 3, size, size) float32, normalised.
        draws: (n, DRAWS) uniform in [0, 1): the choice, then its parameters. A shear is horizontal and uniform in
            ±15°; a flip happens to half of those chosen for it; a crop has 8 to 100 % of the area, an aspect ratio
            of 3/4 to 4/3 (log-uniform) and a uniform place, the first of ten draws that fits (torchvision's
            RandomAffine, RandomHorizontalFlip, RandomResizedCrop). What a shear brings in from outside is black.
    """
    n = len(images)
    choice = (draws[:, 0] * 3).long()
    theta = torch.zeros(n, 2, 3, device=draws.device)  # output coordinates in [-1, 1] → input coordinates
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    angle = torch.deg2rad(draws[:, 1] * 30 - 15)
    theta[:, 0, 1] = torch.where(choice == 0, torch.tan(angle), 0)
    theta[:, 0, 0] = torch.where((choice == 1) & (draws[:, 1] < 0.5), -1.0, theta[:, 0, 0])

    area = 0.08 + 0.92 * draws[:, 1:11]
    ratio = torch.exp((2 * draws[:, 11:21] - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(1, keepdim=True)
    width, height = (torch.where(fits.any(1), side.gather(1, first)[:, 0], 1.0) for side in (width, height))
    crop = choice == 2
    theta[:, 0, 0] = torch.where(crop, width, theta[:, 0, 0])
    theta[:, 1, 1] = torch.where(crop, height, theta[:, 1, 1])
    theta[:, 0, 2] = torch.where(crop, (1 - width) * (2 * draws[:, 21] - 1), 0)
    theta[:, 1, 2] = torch.where(crop, (1 - height) * (2 * draws[:, 22] - 1), 0)

    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=images.device).view(1, 3, 1, 1)
    return F.grid_sample(images - black, grid, padding_mode="zeros", align_corners=False) + black


DRAWS = 23
"""Random numbers per image and epoch that `augment` wants."""


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch, and how many tasks and answers all processes have of it.

    `images` (tasks, 3, size, size); `task` (rows of `images`), `worker`, `label`, each (answers,).
    """

    images: Tensor
    task: Tensor
    worker: Tensor
    label: Tensor
    n_tasks: int
    n_answers: int


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
    ) -> None:
        """`images`: (tasks, size, size, 3) uint8, row i the image of the answers' task i.

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
        self.epoch = 0
        self._starts, self._worker, self._label = (
            torch.from_numpy(part) for part in (answers.starts_at, answers.worker, answers.label)
        )

    def with_answers(self, answers: Answers) -> CrowdLoader:
        """A loader of the same images in the same order, with other answers to them."""
        return CrowdLoader(
            self.dataset, answers, self.batch_size, self.seed, self.augmented, self.device, self.processes
        )

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
        noise = stream(self.seed, epoch, STREAM_AUGMENT)
        draws = torch.rand(len(self.dataset), DRAWS, generator=noise) if self.augmented else None
        for whole in order.tensor_split(len(self))[first:]:
            rows = self.processes.mine(whole)
            batch = on_device(self.dataset[rows], self.device)
            if draws is not None:
                batch = augment(batch, draws[rows])
            task, flat = self._answers_of(rows)
            task, worker, label = (part.to(self.device) for part in (task, self._worker[flat], self._label[flat]))
            n_answers = int((self._starts[whole + 1] - self._starts[whole]).sum())
            yield Batch(batch, task, worker, label, len(whole), n_answers)

    def _answers_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For the tasks `rows`: each answer's position in `rows`, and its position among all answers."""
        first, count = self._starts[rows], self._starts[rows + 1] - self._starts[rows]
        task = torch.repeat_interleave(torch.arange(len(rows)), count)
        within = torch.arange(len(task)) - (count.cumsum(0) - count)[task]
        return task, first[task] + within


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
        self._rows = processes.mine(torch.arange(len(images)))

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, 3, size, size) float32 and (n,) each."""
        made = self._batches()
        return made if at_hand(self.dataset, self.device) else ahead(made)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self._rows) == 0:
            return
        for rows in torch.split(self._rows, self.batch_size):
            yield on_device(self.dataset[rows], self.device), self.labels[rows].to(self.device)


def at_hand(images: Rows, device: torch.device) -> bool:
    """Whether nothing is to wait for when a batch is gathered: neither a decoder nor the way to another device."""
    there = images.device == device if isinstance(images, Tensor) else device.type == "cpu"
    return there and getattr(images, "all_held", True)


def ahead(batches: Iterator[T]) -> Generator[T, None, None]:
    """The same; each is made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
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
