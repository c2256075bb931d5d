"""Image files → one array of bytes, decoded once → batches, augmented and normalised on the device."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from .answers import Answers
from .errors import SettingsError, StoreError, one_line
from .files import disk_errors
from .logs import track
from .processes import Processes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, per RGB channel in [0, 1]; peerannot's and torchvision's."""

STREAM_ORDER, STREAM_AUGMENT, STREAM_DROPOUT = 1, 2, 3
"""Names of the random streams, so that no two of one epoch share their draws."""


FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What an image may be, whatever its name ends with. Pillow knows many more, and some start other programs."""
LARGE = 2**24
"""Images of more pixels are decoded one at a time; those above Pillow's limit, 2**27.4, not at all."""
_large = threading.Lock()


def _one_at_a_time(large: bool) -> AbstractContextManager[object]:
    return _large if large else nullcontext()


class BrokenImageError(ValueError):
    """The file is no image that can be used; the text is the reason."""


def decode(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB, the whole image resized as peerannot does (bilinear, aspect ratio not kept).

    16-bit images keep their upper 8 bits; EXIF rotation is applied; of an animation it is the first picture.

    Raises:
        BrokenImageError: Pillow cannot read it, whatever its reason: decoders meet damage in many ways.
        OSError: the disk failed.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened, _one_at_a_time(opened.width * opened.height > LARGE):
            return square(opened, size)
    except UnidentifiedImageError as error:
        raise BrokenImageError("it is of no known format") from error
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise BrokenImageError(one_line(str(error)) or type(error).__name__) from error


def square(opened: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB of an open image, as `decode` says."""
    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray((np.nan_to_num(np.asarray(image)).clip(0, 1) * 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def decode_all(
    root: Path, names: Sequence[str], size: int, threads: int, folder: Path | None
) -> tuple[Tensor, dict[str, str]]:
    """(images, size, size, 3) uint8, each file decoded once; and the broken ones, which are not there: {name: reason}.

    The array lies in a nameless file of `folder` (default: TMPDIR), so the page cache holds what memory allows.

    Raises:
        StoreError: not enough disk space.
    """
    shape = (len(names), size, size, 3)
    need, free = math.prod(shape), shutil.disk_usage(folder or tempfile.gettempdir()).free
    if need > free:
        raise StoreError(f"disk: {need / 1e9:.1f} GB are needed for {len(names)} decoded images, {free / 1e9:.1f} free")
    with tempfile.TemporaryFile(dir=folder) as file:
        with disk_errors(f"{folder or tempfile.gettempdir()}: {need / 1e9:.1f} GB for decoded images"):
            os.posix_fallocate(file.fileno(), 0, max(need, 1))  # a hole that cannot be filled ends a process by SIGBUS
        held = np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)

    def one(row: int) -> str | None:
        try:
            with disk_errors(names[row]):
                held[row] = decode(root / names[row], size)
        except BrokenImageError as error:
            return str(error)
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(max(threads, 1)) as pool:
        warnings.simplefilter("ignore")  # damage that could be put up with
        reasons = list(track(pool.map(one, range(len(names))), "decode", len(names), "images"))
    whole = [row for row, reason in enumerate(reasons) if reason is None]
    for to, row in enumerate(whole):  # in place: the array may be larger than the memory
        if to != row:
            held[to] = held[row]
    broken = {name: reason for name, reason in zip(names, reasons, strict=True) if reason is not None}
    return torch.from_numpy(held)[: len(whole)], broken


def stream_seed(seed: int, epoch: int, purpose: int, *place: int) -> int:
    """The seed of one purpose in one epoch, or at a place in it (step, process): the same after a resume."""
    sequence = np.random.SeedSequence((seed, epoch, purpose, *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """The random stream of one purpose in one epoch."""
    return torch.Generator().manual_seed(stream_seed(seed, epoch, purpose))


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """(n, size, size, 3) uint8 → (n, 3, size, size) float32 on `device`, channels last in memory."""
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (images.to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std


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
        images: Tensor,
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
    """Batches of images with their labels, in order, each image once: for evaluation."""

    def __init__(self, images: Tensor, labels: Tensor | None, batch_size: int, device: torch.device) -> None:
        """`images`: (images, size, size, 3) uint8; `labels`: (images,), -1 for all when there are none."""
        self.dataset = images
        self.labels = torch.full((len(images),), -1) if labels is None else labels
        self.batch_size = batch_size
        self.device = device

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, 3, size, size) float32 and (n,) each."""
        for rows, labels in zip(
            torch.split(self.dataset, self.batch_size), torch.split(self.labels, self.batch_size), strict=True
        ):
            yield on_device(rows, self.device), labels.to(self.device)
