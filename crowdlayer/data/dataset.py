"""What is trained on: images with answers, images with true labels, and what is left out of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..answers import Answers, Ints
from ..errors import DataError, listed, one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """Images with true labels: `names` (images,), `labels` (images,) index into the classes."""

    names: Sequence[str]
    labels: Ints

    def subset(self, rows: Ints) -> LabelledImages:
        return LabelledImages([self.names[i] for i in rows], self.labels[rows])


@dataclass(frozen=True)
class CrowdImages:
    """Images with answers: task i is `tasks[i]`, its image `names[i]`, its true class `truth[i]`, -1 if not known."""

    names: Sequence[str]
    tasks: Sequence[str]
    answers: Answers
    truth: Ints

    def subset(self, rows: Ints) -> CrowdImages:
        return CrowdImages(
            [self.names[i] for i in rows],
            [self.tasks[i] for i in rows],
            self.answers.of_tasks(rows),
            self.truth[rows],
        )


def spelt_out(name: str) -> str:
    """A file's name as text in UTF-8: bytes of it that are none are spelt out, as in `caf\\xe9-1.png`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Dataset:
    """A data set as it is trained on. `held_out` is there exactly when `val` is not."""

    name: str
    classes: Sequence[str]
    workers: Sequence[str]
    train: CrowdImages
    held_out: CrowdImages | None
    val: LabelledImages | None
    test: LabelledImages | None
    left_out: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Images that could not be decoded and were left out, each with its reason."""

    def first(self, n: int) -> Dataset:
        """The same with `n` images of each part at most; the classes and the workers stay."""

        def few(part: LabelledImages | None) -> LabelledImages | None:
            return None if part is None else LabelledImages(part.names[:n], part.labels[:n])

        def some(part: CrowdImages) -> CrowdImages:
            return part.subset(np.arange(min(n, len(part.names))))

        held_out = None if self.held_out is None else some(self.held_out)
        return replace(self, train=some(self.train), held_out=held_out, val=few(self.val), test=few(self.test))

    def spelt_out(self) -> Dataset:
        """The same with the images' names as texts in UTF-8."""
        crowd = [replace(part, names=[spelt_out(name) for name in part.names]) for part in self.crowd]
        held_out = None if self.held_out is None else crowd[1]
        broken = {spelt_out(name): reason for name, reason in self.broken.items()}
        return replace(self, train=crowd[0], held_out=held_out, broken=broken)

    @property
    def crowd(self) -> list[CrowdImages]:
        """All images with answers: those trained on, then those held out."""
        return [part for part in (self.train, self.held_out) if part is not None]

    @property
    def answers(self) -> Answers:
        """The answers to all tasks, in the order of `crowd`."""
        parts = [part.answers for part in self.crowd]
        before = np.cumsum([0, *(part.n_tasks for part in parts)])
        task = np.concatenate([part.task + start for part, start in zip(parts, before, strict=False)])
        worker, label = (np.concatenate([getattr(part, name) for part in parts]) for name in ("worker", "label"))
        return Answers(int(before[-1]), len(self.workers), task, worker, label)

    @property
    def truth(self) -> Ints:
        """(tasks,): the true class of all tasks in the order of `crowd`, -1 where it is not known."""
        return np.concatenate([part.truth for part in self.crowd])


def who_answered(workers: Sequence[str], parts: Sequence[CrowdImages]) -> tuple[list[str], list[CrowdImages]]:
    """The workers with an answer in `parts`, and these parts counting them alone: others have nothing to learn from."""
    present = np.unique(np.concatenate([part.answers.worker for part in parts]))
    row = np.zeros(len(workers), dtype=np.int64)
    row[present] = np.arange(len(present))
    return [workers[i] for i in present], [
        replace(part, answers=replace(part.answers, n_workers=len(present), worker=row[part.answers.worker]))
        for part in parts
    ]


def hold_out(crowd: CrowdImages, fraction: float, seed: int) -> tuple[CrowdImages, CrowdImages]:
    """`crowd` without, and only with, a random `fraction` of its tasks (at least one)."""
    n = len(crowd.names)
    if n < 2:
        raise DataError("train/: without val/ at least 2 answered tasks are needed, to hold one out; there is 1")
    held = min(max(1, round(fraction * n)), n - 1)
    order = np.random.default_rng(seed).permutation(n)
    log.info("no val/: %d of %d tasks held out to choose the epoch by their answers", held, n)
    return crowd.subset(np.sort(order[held:])), crowd.subset(np.sort(order[:held]))


def without_broken(dataset: Dataset, broken: Mapping[str, str], at_most: float) -> Dataset:
    """The data set without its `broken` images, {name: reason}.

    Args:
        at_most: how many there may be; below 1 a share of all images.

    Raises:
        DataError: there are more, or no image is left of a split.
    """
    if not broken:
        return dataset
    labelled_parts = {"val": dataset.val, "test": dataset.test}
    names = [name for part in (*dataset.crowd, *labelled_parts.values()) if part is not None for name in part.names]
    complaints = [f"{one_line(name)}: must be an image: {reason}" for name, reason in sorted(broken.items())]
    if len(broken) > (at_most * len(names) if at_most < 1 else at_most):
        rule = f"{len(broken)} of {len(names)} images are broken, more than MAX_BAD_IMAGES={at_most:g} allows"
        raise DataError(f"{rule}: {complaints[0]}", *complaints[1:])
    log.warning("left out: %d broken images: %s", len(broken), listed(complaints), extra={"broken_images": len(broken)})

    def whole(part: CrowdImages | LabelledImages) -> Ints:
        rows = [row for row, name in enumerate(part.names) if name not in broken]
        if not rows:
            raise DataError(f"{part.names[0].split('/')[0]}/: at least one image must be whole, none is")
        return np.array(rows, dtype=np.int64)

    workers, crowd = who_answered(dataset.workers, [part.subset(whole(part)) for part in dataset.crowd])
    val, test = (None if part is None else part.subset(whole(part)) for part in labelled_parts.values())
    return replace(
        dataset,
        workers=workers,
        train=crowd[0],
        held_out=None if dataset.held_out is None else crowd[1],
        val=val,
        test=test,
        left_out=dataset.left_out | {"broken_images": len(broken)},
        broken=dict(broken),
    )


def summary(dataset: Dataset) -> dict[str, Any]:
    """The counts that the log and the results show."""
    return {
        "n_tasks": sum(len(part.names) for part in dataset.crowd),
        "n_workers": len(dataset.workers),
        "n_answers": sum(len(part.answers) for part in dataset.crowd),
        "n_classes": len(dataset.classes),
    }
