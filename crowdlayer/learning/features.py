"""FREEZE=true: what reaches the head of a frozen network is computed once per image, and trained on."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.held import mapped, room
from ..data.images import Rows, resident
from ..data.pixels import on_device
from ..storage.files import SPARE, disk_errors
from .classifier import head
from .trainer import EVALUATION_BATCHES, Trainer

log = logging.getLogger(__name__)


@contextmanager
def on_features(trainer: Trainer, folder: Path | None, known: dict[str, Rows], spare: int = SPARE) -> Iterator[None]:
    """Meanwhile the trainer sees features for images, and its classifier is the head alone.

    Only where these never change: a frozen network without augmentation and mixup, whose last layer is its head, and of
    which EMA keeps no second; and where the disk has room for them beside `spare` bytes. The weights keep their names,
    so a checkpoint is the same with and without. The arrays lie in nameless files of `folder`; what was computed is put
    to `known`, for trainers of the same images and frozen weights.
    """
    loader, validation, classifier = trainer.train, trainer.validation, trainer.classifier
    settings = trainer.settings
    changing = not settings.freeze or loader.augmented or settings.mixup > 0 or settings.ema > 0
    images, place = loader.dataset, folder or Path(tempfile.gettempdir())
    n = len(images) + len(validation.images)
    size = 0 if changing else n * _size_each(trainer)
    if not size or not (known or _find_room(trainer, size, place, spare)):
        yield
        return
    if not known:
        log.info("frozen: the features of %d images are computed once", n)
        every, device = {"train": images, "validation": validation.images}, trainer.accelerator.device
        known |= {name: resident(features(trainer, some, place), device) for name, some in every.items()}
    loader.dataset = known["train"]
    trainer.validation = replace(validation, images=known["validation"])
    classifier.forward = head(classifier).forward
    try:
        yield
    finally:
        del classifier.forward  # the class's own again
        loader.dataset, trainer.validation = images, validation


def features(trainer: Trainer, images: Rows, place: Path) -> Rows:
    """(images, …) float32: the input of the head for (images, size, size, 3) uint8; the same bits on all processes.

    Raises:
        StoreError: the disk failed, or is full.
    """
    with disk_errors(f"{place}: the features of {len(images)} images"), tempfile.TemporaryFile(dir=place) as file:
        for rows in torch.split(torch.arange(len(images)), EVALUATION_BATCHES * trainer.settings.batch_size):
            trainer.stop_if_asked()
            given = trainer.processes.gather(_head_input(trainer, images[trainer.processes.mine(rows)])[0])
            file.write(given.contiguous().numpy().data)
        file.flush()
        return mapped(file, given.dtype, tuple(given.shape[1:]))


def _find_room(trainer: Trainer, size: int, place: Path, spare: int) -> bool:
    """Whether every node has room for `size` bytes of each of its processes; collective."""
    hosts = trainer.processes.gather_texts(socket.gethostname())
    needed = size * hosts.count(socket.gethostname())
    with disk_errors(str(place)):
        full = needed > room(place, spare)
    if trainer.processes.any(full):
        log.warning("frozen: %.0f MB of features find no room in %s, each epoch computes them", needed / 1e6, place)
        return False
    return True


def _size_each(trainer: Trainer) -> int:
    """Bytes of an image's features; none where the head's output is not the network's: squeezenet pools after it."""
    given, output = _head_input(trainer, trainer.train.dataset[:2])
    with torch.inference_mode(), trainer.accelerator.autocast():
        again = head(trainer.classifier)(given)
    return given[0].nbytes if again.shape == output.shape and torch.equal(again, output) else 0


@torch.inference_mode()
def _head_input(trainer: Trainer, images: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the head for (n, size, size, 3) uint8 images, and the network's output."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        caught.append(given[0].float())

    classifier = trainer.classifier.eval()
    with head(classifier).register_forward_pre_hook(catch), trainer.accelerator.autocast():
        output: Tensor = classifier(on_device(images, trainer.accelerator.device))
    return caught[0], output
