"""The names of a data set's files → its splits, and which image belongs to which task.

Works on relative names alone, so that a folder, a bucket and an archive with the same tree are the same data set.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from ..answers import AnswerFile, Answers, canonical, look_up, majority_vote
from ..answers.files import read_answers
from ..errors import Complaints, DataError, few, one_line, short
from ..settings import DataSettings, name_of
from .classes import METADATA, all_named, check_class_order, class_folder, find_classes, read_metadata
from .dataset import CrowdImages, Dataset, LabelledImages, hold_out, who_answered

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
ANSWERS = "answers.json"


@cache
def image_types() -> tuple[str, ...]:
    """The endings that torchvision's ImageFolder takes, read from its source: importing it takes torch, and seconds."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "datasets" / "folder.py").read_text(encoding="utf-8")
    listed = re.search(r"^IMG_EXTENSIONS = (\(.*?\))$", source, re.MULTILINE | re.DOTALL)
    if listed is None:  # a torchvision that writes it another way
        from torchvision.datasets.folder import IMG_EXTENSIONS

        return tuple(IMG_EXTENSIONS)
    endings: tuple[str, ...] = ast.literal_eval(listed[1])
    return endings


def belongs(name: str) -> bool:
    """Whether the relative `name` is a file of a data set: an image of a split, the answers or the metadata."""
    split, _, rest = name.partition("/")
    return name in (ANSWERS, METADATA) or (split in SPLITS and is_image(rest))


def is_image(name: str) -> bool:
    """Whether the relative `name` is an image, by its ending, and nothing hidden: neither it nor a folder above it."""
    hidden = any(part.startswith(".") or part in ("__MACOSX", "lost+found") for part in name.split("/"))
    return not hidden and name.lower().endswith(image_types())


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
        drop = frozenset[str]() if removed is None else read_removed(removed)
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
    if not all_named(file.labels, classes):
        check_class_order(majority_vote(crowd.answers, len(classes)), crowd.truth, classes)
    workers, (crowd,) = who_answered(file.workers, [crowd])
    if metadata.n_workers is not None and metadata.n_workers != len(workers):
        log.warning("%s says n_workers=%d, %d answered: the answers decide", METADATA, metadata.n_workers, len(workers))
    held_out = None
    if val is None:
        crowd, held_out = hold_out(crowd, settings.val_fraction, seed)
    name = one_line(metadata.name or "") or name_of(settings.tasks)
    return Dataset(name, classes, workers, crowd, held_out, val, test, left_out)


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
    names: Sequence[str], file: AnswerFile, answers: Answers, classes: Sequence[str], drop: frozenset[str]
) -> tuple[CrowdImages, dict[str, int]]:
    """The train images that have answers, in the order of `names`, and how many of what was left out."""
    number = {task: i for i, task in enumerate(file.tasks)}
    image_of: dict[int, str] = {}
    complaints = []
    left_out = {"images_without_answers": 0, "answered_tasks_without_image": 0, "tasks_removed": 0, "broken_images": 0}
    answered = np.diff(answers.starts_at) > 0
    for name in names:
        stem = name.rpartition("/")[2].rpartition(".")[0]
        whole, part = canonical(stem), canonical(stem.rpartition("-")[2])
        named = {whole} & number.keys() or {part} & number.keys() or {whole, part}
        task = number.get(whole, number.get(part))
        if task is not None and not answered[task]:
            task = None
        if named & drop:
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


def read_removed(path: Path) -> frozenset[str]:
    """The tasks of peerannot's file: `position task` per line, or `-1 task` where it comes from an aggregation.

    A position counts the files as torchvision's ImageFolder finds them, which depends on all of them: the task decides.

    Raises:
        DataError: no such file, or a line of it is not two integers.
    """
    try:
        rows = [[int(value) for value in line.split()[:2]] for line in path.read_text().splitlines() if line.split()]
    except (OSError, ValueError) as error:
        raise DataError(f"PATH_REMOVE {path.name}: must hold two integers per line: {one_line(str(error))}") from error
    if any(len(row) < 2 for row in rows):
        raise DataError(f"PATH_REMOVE {path.name}: must hold two integers per line")
    return frozenset(str(task) for _, task in rows)
