"""Which classes there are, and in which order the labels count them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..answers import DECIMAL, Ints, composed
from ..errors import DataError, SettingsError, few
from ..settings import DataSettings
from ..storage.files import decode_json

log = logging.getLogger(__name__)

METADATA = "metadata.json"
MOST_CLASSES = 100_000
"""No label from here on is an index; one that is wrong must not become memory for as many classes."""
WRITTEN = re.compile("[\u200c\u200d\u00a0\u3000]")
"""What Python does not call printable and names are written with: joiners, in Persian and Hindi, and other spaces."""


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
        metadata = decode_json(path.read_bytes(), Metadata)
    except ValueError as error:
        raise DataError(f"{METADATA}: {error}") from error
    if metadata.n_classes is not None and metadata.n_classes > MOST_CLASSES:
        raise DataError(f"{METADATA}: n_classes must be at most {MOST_CLASSES}, got {metadata.n_classes}")
    if metadata.classes is not None and len(set(metadata.classes)) < max(2, len(metadata.classes)):
        raise DataError(f"{METADATA}: classes must be at least two different names, got {few(metadata.classes)}")
    return metadata


def class_folder(name: str) -> str | None:
    """The folder right below the split in which the image lies, `composed`."""
    parts = name.split("/")
    return composed(parts[1]) if len(parts) > 2 else None


def find_classes(
    images: Mapping[str, Sequence[str]], settings: DataSettings, metadata: Metadata, labels: Sequence[int | str]
) -> list[str]:
    """The class names in label order: CLASSES, metadata.json, the folders, or the numbers from 0.

    Args:
        images: their names, by split.
        labels: those of the answers, each once.

    Raises:
        SettingsError: N_CLASSES is another number.
        DataError: fewer than two, or names that are no printable text or are the same.
    """
    named = metadata.classes if settings.classes is None else settings.classes
    if named is None:
        classes = _unnamed(images, settings.n_classes or metadata.n_classes, labels)
    else:
        classes = [composed(name) for name in named]
    _check(classes, settings, metadata)
    return classes


def _unnamed(images: Mapping[str, Sequence[str]], wanted: int | None, labels: Sequence[int | str]) -> list[str]:
    """The class folders, or the numbers from 0; `wanted`: how many there are, where that is said.

    Folders under train/ count when there are none under val/ and test/ or when they share a name with those: else they
    are no class folders. The wanted number settles it between folders with and without train's.
    """
    folders = {s: {f for f in map(class_folder, names) if f is not None} for s, names in images.items()}
    labelled_folders = folders["val"] | folders["test"]
    found = labelled_folders
    if not labelled_folders or labelled_folders & folders["train"]:
        found = labelled_folders | folders["train"]
    if len(found) != wanted and len(labelled_folders) == wanted:
        found = labelled_folders
    if not labelled_folders and (len(found) < 2 or (wanted is not None and len(found) != wanted)):
        if len(found) > 1:
            log.warning("the %d folders of train/ are no classes: n_classes is %d", len(found), wanted)
        found = set()  # nothing but folders of train/, and they are not the classes
    numbers = [
        int(label) for label in labels if isinstance(label, int) or (DECIMAL.fullmatch(label) and len(label) < 10)
    ]
    numbers = [number for number in numbers if number < MOST_CLASSES]
    _warn_of_numbers(sorted(found), labels)
    if not labelled_folders and found and numbers and max(numbers) + 1 < len(found):
        log.warning(
            "the %d folders of train/ are taken for the classes, the answers have the labels up to %d: where they "
            "are no classes, set N_CLASSES", len(found), max(numbers),
        )  # fmt: skip
    return sorted(found) or [str(i) for i in range(wanted or max([*numbers, 1]) + 1)]


def _check(classes: Sequence[str], settings: DataSettings, metadata: Metadata) -> None:
    """Refuse, or warn of, names and a number of them that cannot be meant."""
    if settings.n_classes is not None and settings.n_classes != len(classes):
        raise SettingsError(
            f"N_CLASSES: must agree with the data set's {len(classes)} classes ({few(classes)}), "
            f"got {settings.n_classes}"
        )
    if metadata.n_classes is not None and metadata.n_classes != len(classes):
        log.warning(
            "%s says n_classes=%d, the data set has %d: %s",
            METADATA, metadata.n_classes, len(classes), few(classes),
        )  # fmt: skip
    if unreadable := [name for name in classes if not WRITTEN.sub("", name).isprintable()]:
        raise DataError(f"class names must be printable text in UTF-8, got {few(unreadable)}")
    if len(set(classes)) < len(classes):
        raise DataError(f"class names must differ in more than the form of their letters, got {few(classes)}")
    if len({name.casefold() for name in classes}) < len(classes):
        log.warning("some class names differ in capitals only: %s", few(classes))
    if len(classes) < 2:
        raise DataError(f"the data set must have at least 2 classes, has {len(classes)} ({few(classes)})")


def all_named(labels: Sequence[int | str], classes: Sequence[str]) -> bool:
    """Whether the answers name the classes, and count none."""
    names = set(classes)
    return all(isinstance(label, str) and composed(label) in names for label in labels)


def _warn_of_numbers(classes: Sequence[str], labels: Sequence[int | str]) -> None:
    """Say it where folders that are numbers sort otherwise as text, and labels count them instead of naming them."""
    if all_named(labels, classes):
        return
    if all(DECIMAL.fullmatch(name) for name in classes) and classes != (by_number := sorted(classes, key=int)):
        label = next(i for i, name in enumerate(by_number) if name != classes[i])
        log.warning(
            "the class folders are numbers, and sorted as text: label %d means class %s; if it shall mean %s, set "
            "CLASSES=%s", label, classes[label], by_number[label], few(by_number),
        )  # fmt: skip


def check_class_order(vote: Ints, truth: Ints, classes: Sequence[str]) -> None:
    """Stop where the answers count the classes in another order than ours.

    Peerannot's CIFAR-10H counts plane 0, car 1, bird 2 …, its folders sort otherwise. Where majority vote agrees with
    the class folders under another order at least twice as well, and that order, found on one half of the tasks,
    is far above chance on the other half, the answers do not count as we do.

    Args:
        vote: (tasks,) the majority's labels.
        truth: (tasks,) the classes that the folders name, -1 where they name none.

    Raises:
        DataError: with the order to set.
    """
    known = np.flatnonzero(truth >= 0)
    if len(known) < 4:
        return
    table = [np.zeros((len(classes), len(classes)), dtype=np.int64) for _ in range(2)]  # [half][label, folder]
    for half in range(2):
        rows = known[half::2]
        np.add.at(table[half], (vote[rows], truth[rows]), 1)
    order = best_order(table[0])
    n = table[1].sum()
    agreement = np.trace(table[1]) / n
    other = table[1][np.arange(len(classes)), order].sum() / n
    chance = float((table[1].sum(1) / n) @ (table[1].sum(0)[order] / n))  # of that order: where one is frequent, much
    if other >= 2 * agreement and other > chance + 5 * np.sqrt(chance * (1 - chance) / n):
        whole = table[0] + table[1]
        order = best_order(whole)
        names = [classes[i] for i in order]
        plain = not any("," in name or name.startswith("[") for name in names)
        suggestion = ",".join(names) if plain else json.dumps(names, ensure_ascii=False)
        unknown = [classes[folder] for label, folder in enumerate(order) if not whole[label, folder]]
        raise DataError(
            "answers.json counts the classes in another order than the folders: majority vote agrees with "
            f"{agreement:.0%} of the class folders of train/, but with {other:.0%} under the order "
            f"CROWDLAYER_CLASSES={suggestion}"
            + (f"; nothing tells the place of {few(unknown)}: is it a class?" if unknown else "")
        )


def best_order(table: Ints) -> Ints:
    """For each label the folder that goes with it, one to one: the largest counts of (labels, folders) first."""
    order = np.full(len(table), -1, dtype=np.int64)
    free = np.ones(len(table), dtype=bool)
    labels, folders = np.nonzero(table)
    for pair in np.argsort(-table[labels, folders], kind="stable"):
        label, folder = labels[pair], folders[pair]
        if order[label] < 0 and free[folder]:
            order[label], free[folder] = folder, False
    order[order < 0] = np.flatnonzero(free)
    return order
