"""The names of a data set's files → its classes, its splits, and which image belongs to which task.

Works on relative names alone, so that a folder, a bucket and an archive with the same tree are the same data set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from .answer_files import read_answers
from .answers import DECIMAL, AnswerFile, Answers, Ints, canonical, look_up, majority_vote
from .errors import DataError, SettingsError, listed, one_line
from .settings import DataSettings

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
ANSWERS, METADATA = "answers.json", "metadata.json"


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

    @property
    def crowd(self) -> list[CrowdImages]:
        """All images with answers: those trained on, then those held out."""
        return [part for part in (self.train, self.held_out) if part is not None]


@dataclass(frozen=True)
class Metadata:
    """metadata.json; every field is a hint that may be missing, `classes` names the classes in label order."""

    name: str | None = None
    n_classes: int | None = None
    n_workers: int | None = None
    n_tasks: int | None = None
    classes: list[str] | None = None


def read_metadata(path: Path) -> Metadata:
    """Read metadata.json, empty where there is none; fields that the contract does not name are ignored.

    Raises:
        DataError: not JSON, or a field of the wrong type.
    """
    if not path.is_file():
        return Metadata()
    try:
        metadata = msgspec.json.decode(path.read_bytes(), type=Metadata)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{METADATA}: {one_line(str(error))}") from error
    if metadata.classes is not None and len(set(metadata.classes)) < max(2, len(metadata.classes)):
        raise DataError(f"{METADATA}: classes must be at least two different names, got {metadata.classes}")
    return metadata


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
        DataError: naming everything that keeps the data set from being used.
        SettingsError: N_CLASSES does not agree with the data.
    """
    images: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(names, key=lambda name: name.split("/")):
        if belongs(name) and "/" in name:
            images[name.split("/")[0]].append(name)
    file = read_answers(answers, kept)
    metadata = read_metadata(root / METADATA)
    classes = find_classes(images, settings, metadata, file)
    given = look_up(file, classes, answers.name)
    val, test = (labelled(images[split], classes) for split in ("val", "test"))
    crowd, left_out = crowd_images(images["train"], file, given, classes, removed)
    check_class_order(crowd, classes)
    present = np.unique(crowd.answers.worker)  # workers whose every task was left out have nothing to learn from
    row = np.zeros(len(file.workers), dtype=np.int64)
    row[present] = np.arange(len(present))
    of_all = crowd.answers
    crowd = CrowdImages(
        crowd.names,
        crowd.tasks,
        Answers(of_all.n_tasks, len(present), of_all.task, row[of_all.worker], of_all.label),
        crowd.truth,
    )
    workers = [file.workers[i] for i in present]
    if metadata.n_workers is not None and metadata.n_workers != len(workers):
        log.warning("%s says n_workers=%d, %d answered: the answers decide", METADATA, metadata.n_workers, len(workers))
    held_out = None
    if val is None:
        crowd, held_out = hold_out(crowd, settings.val_fraction, seed)
    return Dataset(metadata.name or root.name, classes, workers, crowd, held_out, val, test, left_out)


def class_folder(name: str) -> str | None:
    """The folder right below the split in which the image lies."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 else None


def find_classes(
    images: dict[str, list[str]], settings: DataSettings, metadata: Metadata, file: AnswerFile
) -> list[str]:
    """The class names in label order: CLASSES, metadata.json, the folders, or the numbers from 0.

    Folders under train/ count when there are none under val/ and test/ or when they share a name with those:
    else they are no class folders. Metadata's n_classes settles it between folders with and without train's.
    """
    if settings.classes is not None:
        classes = list(settings.classes)
    elif metadata.classes is not None:
        classes = metadata.classes
    else:
        folders = {s: {f for f in map(class_folder, images[s]) if f is not None} for s in SPLITS}
        labelled_folders = folders["val"] | folders["test"]
        found = labelled_folders
        if not labelled_folders or labelled_folders & folders["train"]:
            found = labelled_folders | folders["train"]
        wanted = settings.n_classes or metadata.n_classes
        if len(found) != wanted and len(labelled_folders) == wanted:
            found = labelled_folders
        if not labelled_folders and (len(found) < 2 or (wanted is not None and len(found) != wanted)):
            found = set()  # nothing but folders of train/, and they are not the classes
        numbers = [int(label) for label in file.labels if isinstance(label, int) or DECIMAL.fullmatch(label)]
        classes = sorted(found) or [str(i) for i in range(wanted or max([*numbers, 1]) + 1)]
    if settings.n_classes is not None and settings.n_classes != len(classes):
        raise SettingsError(
            f"N_CLASSES: must agree with the data set's {len(classes)} classes ({_few(classes)}), "
            f"got {settings.n_classes}"
        )
    if metadata.n_classes is not None and metadata.n_classes != len(classes):
        log.warning(
            "%s says n_classes=%d, the data set has %d: %s",
            METADATA, metadata.n_classes, len(classes), _few(classes),
        )  # fmt: skip
    if any(not name.isprintable() for name in classes):
        raise DataError(
            f"class names must be printable text in UTF-8, got {_few([n for n in classes if not n.isprintable()])}"
        )
    if len(classes) < 2:
        raise DataError(f"the data set must have at least 2 classes, has {len(classes)} ({_few(classes)})")
    return classes


def labelled(names: Sequence[str], classes: Sequence[str]) -> LabelledImages | None:
    """The images of val/ or test/ with the class that their folder names; None where there are none."""
    index = {name: i for i, name in enumerate(classes)}
    strangers = sorted({one_line(str(PurePosixPath(n).parent)) for n in names if class_folder(n) not in index})
    if strangers:
        rule = f"must be named for one of the classes ({_few(classes)})"
        raise DataError(listed([f"{folder}/: {rule}" for folder in strangers]))
    if not names:
        return None
    return LabelledImages(names, np.array([index[class_folder(n) or ""] for n in names], dtype=np.int64))


def crowd_images(
    names: Sequence[str], file: AnswerFile, answers: Answers, classes: Sequence[str], removed: Path | None
) -> tuple[CrowdImages, dict[str, int]]:
    """The train images that have answers, in the order of `names`, and how many of what was left out."""
    number = {task: i for i, task in enumerate(file.tasks)}
    image_of: dict[int, str] = {}
    complaints = []
    left_out = {"images_without_answers": 0, "answered_tasks_without_image": 0, "tasks_removed": 0}
    drop = _removed(removed, names) if removed is not None else None
    answered = np.diff(answers.starts_at) > 0
    for position, name in enumerate(names):
        stem = PurePosixPath(name).stem
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
                f"{one_line(name)}: task {one_line(file.tasks[task])} must have one image, "
                f"has {one_line(image_of[task])} too"
            )
    if complaints:
        raise DataError(listed(complaints))
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


def _removed(path: Path, names: Sequence[str]) -> Removed:
    """Peerannot's file: `position task` per line, or `-1 task` where it comes from an aggregation."""
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


def check_class_order(crowd: CrowdImages, classes: Sequence[str]) -> None:
    """Stop where the answers count the classes in another order than ours.

    Peerannot's CIFAR-10H counts plane 0, car 1, bird 2 …, its folders sort otherwise. Where majority vote agrees with
    the class folders under another order at least twice as well, and that order, found on one half of the tasks,
    is far above chance on the other half, the answers do not count as we do.

    Raises:
        DataError: with the order to set.
    """
    vote = majority_vote(crowd.answers, len(classes))
    known = np.flatnonzero(crowd.truth >= 0)
    if len(known) < 4:
        return
    table = [np.zeros((len(classes), len(classes)), dtype=np.int64) for _ in range(2)]  # [half][label, folder]
    for half in range(2):
        rows = known[half::2]
        np.add.at(table[half], (vote[rows], crowd.truth[rows]), 1)
    order = best_order(table[0])
    n = table[1].sum()
    agreement = np.trace(table[1]) / n
    other = table[1][np.arange(len(classes)), order].sum() / n
    chance = float((table[1].sum(1) / n) @ (table[1].sum(0) / n))
    if other >= 2 * agreement and other > chance + 5 * np.sqrt(chance * (1 - chance) / n):
        suggestion = ",".join(classes[i] for i in best_order(table[0] + table[1]))
        raise DataError(
            "answers.json counts the classes in another order than the folders: majority vote agrees with "
            f"{agreement:.0%} of the class folders of train/, but with {other:.0%} under the order "
            f"CROWDLAYER_CLASSES={suggestion}"
        )


def best_order(table: Ints) -> Ints:
    """For each label the folder that goes with it, one to one: the largest counts of (labels, folders) first."""
    order = np.full(len(table), -1, dtype=np.int64)
    free = np.ones(len(table), dtype=bool)
    for flat in np.argsort(-table, axis=None, kind="stable"):
        label, folder = divmod(int(flat), len(table))
        if order[label] < 0 and free[folder]:
            order[label], free[folder] = folder, False
    return order


def _few(names: Sequence[str], shown: int = 12) -> str:
    return one_line(", ".join(names[:shown]) + (f", … {len(names) - shown} more" if len(names) > shown else ""))


def summary(dataset: Dataset) -> dict[str, Any]:
    """The counts that the log and the results show."""
    return {
        "n_tasks": sum(len(part.names) for part in dataset.crowd),
        "n_workers": len(dataset.workers),
        "n_answers": sum(len(part.answers) for part in dataset.crowd),
        "n_classes": len(dataset.classes),
    }
