"""The names of a data set's files → its splits, and which image belongs to which task.

Works on relative names alone, so that a folder, a bucket and an archive with the same tree are the same data set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..answers import AnswerFile, Answers, Ints, canonical, look_up, majority_vote
from ..answers.files import read_answers
from ..errors import Complaints, DataError, listed, one_line, short
from ..settings import DataSettings
from .classes import METADATA, check_class_order, class_folder, few, find_classes, read_metadata

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
ANSWERS = "answers.json"


def belongs(name: str) -> bool:
    """Whether the relative `name` is a file of a data set: an image of a split, the answers or the metadata."""
    if name in (ANSWERS, METADATA):
        return True
    split, *rest = name.split("/")
    if split not in SPLITS or not rest or any(part.startswith(".") or part == "__MACOSX" for part in rest):
        return False
    return rest[-1].lower().endswith(IMG_EXTENSIONS)


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


def read_dataset(
    root: Path,
    names: Iterable[str],
    settings: DataSettings,
    answers: Path,
    removed: Path | None,
    seed: int,
    kept: Path | None = None,
) -> Dataset:
    """Read the data set under `root`, whose files have the relative `names`.

    Args:
        answers: the answers' file.
        removed: peerannot's file of tasks to leave out.
        seed: of the choice of the held-out tasks.
        kept: where the arrays of the answers are kept for the next start, see `read_answers`.

    Raises:
        DataError: naming everything that keeps the data set from being used, not the first thing alone.
        SettingsError: N_CLASSES does not agree with the data.
    """
    complaints = Complaints()
    images: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(names, key=lambda name: name.split("/")):
        if belongs(name) and "/" in name:
            images[name.split("/")[0]].append(name)
    with complaints:
        file = read_answers(answers, kept)
    with complaints:
        metadata = read_metadata(root / METADATA)
    with complaints:
        drop = None if removed is None else read_removed(removed)
    complaints.close()
    classes = find_classes(images, settings, metadata, file.labels)
    given = file.answers
    with complaints:
        given = look_up(file, classes, answers.name)
    with complaints:
        val = labelled(images["val"], classes)
    with complaints:
        test = labelled(images["test"], classes)
    with complaints:
        crowd, left_out = crowd_images(images["train"], file, given, classes, drop)
    complaints.close()
    check_class_order(majority_vote(crowd.answers, len(classes)), crowd.truth, classes)
    workers, (crowd,) = _who_answered(file.workers, [crowd])
    if metadata.n_workers is not None and metadata.n_workers != len(workers):
        log.warning("%s says n_workers=%d, %d answered: the answers decide", METADATA, metadata.n_workers, len(workers))
    held_out = None
    if val is None:
        crowd, held_out = hold_out(crowd, settings.val_fraction, seed)
    return Dataset(metadata.name or root.name, classes, workers, crowd, held_out, val, test, left_out)


def _who_answered(workers: Sequence[str], parts: Sequence[CrowdImages]) -> tuple[list[str], list[CrowdImages]]:
    """The workers with an answer in `parts`, and these parts counting them alone: others have nothing to learn from."""
    present = np.unique(np.concatenate([part.answers.worker for part in parts]))
    row = np.zeros(len(workers), dtype=np.int64)
    row[present] = np.arange(len(present))
    return [workers[i] for i in present], [
        replace(part, answers=replace(part.answers, n_workers=len(present), worker=row[part.answers.worker]))
        for part in parts
    ]


def labelled(names: Sequence[str], classes: Sequence[str]) -> LabelledImages | None:
    """The images of val/ or test/ with the class that their folder names; None where there are none."""
    index = {name: i for i, name in enumerate(classes)}
    strangers = sorted({one_line(str(PurePosixPath(n).parent)) for n in names if class_folder(n) not in index})
    if strangers:
        rule = f"must be named for one of the classes ({few(classes)})"
        raise DataError(*(f"{folder}/: {rule}" for folder in strangers))
    if not names:
        return None
    return LabelledImages(names, np.array([index[class_folder(n) or ""] for n in names], dtype=np.int64))


def crowd_images(
    names: Sequence[str], file: AnswerFile, answers: Answers, classes: Sequence[str], drop: Removed | None
) -> tuple[CrowdImages, dict[str, int]]:
    """The train images that have answers, in the order of `names`, and how many of what was left out."""
    number = {task: i for i, task in enumerate(file.tasks)}
    image_of: dict[int, str] = {}
    complaints = []
    left_out = {"images_without_answers": 0, "answered_tasks_without_image": 0, "tasks_removed": 0, "broken_images": 0}
    answered = np.diff(answers.starts_at) > 0
    for position, name in enumerate(names):
        stem = name.rpartition("/")[2].rpartition(".")[0]
        whole, part = canonical(stem), canonical(stem.rpartition("-")[2])
        task = number.get(whole, number.get(part))
        if task is not None and not answered[task]:
            task = None
        if drop is not None and (position in drop.positions or whole in drop.tasks or part in drop.tasks):
            left_out["tasks_removed"] += 1
            if task is not None:
                image_of[task] = ""
        elif task is None:
            left_out["images_without_answers"] += 1
        elif image_of.setdefault(task, name) != name:
            complaints.append(
                f"{one_line(name)}: task {short(file.tasks[task])} must have one image, "
                f"has {one_line(image_of[task])} too"
            )
    if complaints:
        raise DataError(*complaints)
    rows = [task for task, name in image_of.items() if name]
    left_out["answered_tasks_without_image"] = int(answered.sum()) - len(image_of)
    for what, count in left_out.items():
        if count:
            log.warning("left out: %d %s", count, what.replace("_", " "), extra={what: count})
    if not rows:
        raise DataError(
            f"train/: at least one image must belong to an answered task, of {len(names)} images "
            f"and {answered.sum()} answered tasks none do"
        )
    index = {name: i for i, name in enumerate(classes)}
    kept = [image_of[task] for task in rows]
    truth = np.array([index.get(class_folder(name) or "", -1) for name in kept], dtype=np.int64)
    tasks = [file.tasks[task] for task in rows]
    return CrowdImages(kept, tasks, answers.of_tasks(np.array(rows, dtype=np.int64)), truth), left_out


@dataclass(frozen=True)
class Removed:
    """What PATH_REMOVE names: positions in the order of train's images, or tasks."""

    positions: frozenset[int]
    tasks: frozenset[str]


def read_removed(path: Path) -> Removed:
    """Peerannot's file: `position task` per line, or `-1 task` where it comes from an aggregation.

    Raises:
        DataError: no such file.
    """
    try:
        rows = [[int(value) for value in line.split()[:2]] for line in path.read_text().splitlines() if line.split()]
    except (OSError, ValueError) as error:
        raise DataError(f"PATH_REMOVE {path.name}: must hold two integers per line: {one_line(str(error))}") from error
    if any(len(row) < 2 for row in rows):
        raise DataError(f"PATH_REMOVE {path.name}: must hold two integers per line")
    if rows and rows[0][0] == -1:
        return Removed(frozenset(), frozenset(str(task) for _, task in rows))
    return Removed(frozenset(position for position, _ in rows), frozenset())


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

    workers, crowd = _who_answered(dataset.workers, [part.subset(whole(part)) for part in dataset.crowd])
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
