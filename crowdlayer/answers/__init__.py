"""Who answered what to which task: flat arrays, and what is counted from them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import DataError, few, short

Ints = npt.NDArray[np.int64]

DECIMAL = re.compile(r"[0-9]+")


def composed(text: str) -> str:
    """The form in which é is one letter: file names of some systems have it as two."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def canonical(identifier: str) -> str:
    """The form under which two spellings of a task's id meet: decimal ids by value (`007` is `7`), text `composed`."""
    return identifier.lstrip("0") or "0" if DECIMAL.fullmatch(identifier) else composed(identifier)


def natural_order(identifier: str) -> tuple[bool, int, str]:
    """A sort key: decimal ids by value, then text."""
    decimal = DECIMAL.fullmatch(identifier) is not None
    return (not decimal, len(canonical(identifier)) if decimal else 0, canonical(identifier))


@dataclass(frozen=True)
class Answers:
    """The answers to tasks 0 … n_tasks-1 by workers 0 … n_workers-1, sorted by task.

    `task`, `worker` and `label` have shape (answers,).
    """

    n_tasks: int
    n_workers: int
    task: Ints
    worker: Ints
    label: Ints

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def starts_at(self) -> Ints:
        """(tasks + 1,): the answers of task i are those from starts_at[i] to starts_at[i+1]."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.task, minlength=self.n_tasks))]).astype(np.int64)

    @cached_property
    def pairs(self) -> tuple[Ints, Ints, Ints]:
        """The (worker, label) that occur, sorted: worker (pairs,) and label (pairs,); each answer's pair (answers,)."""
        n_labels = int(self.label.max(initial=0)) + 1
        pair, of_answer = np.unique(self.worker * n_labels + self.label, return_inverse=True)
        worker, label = np.divmod(pair, n_labels)
        return worker, label, of_answer

    def of_tasks(self, tasks: Ints) -> Answers:
        """The answers to `tasks` (n,) alone, which become tasks 0 … n-1 in that order; the workers stay."""
        place = np.full(self.n_tasks, -1, dtype=np.int64)
        place[tasks] = np.arange(len(tasks))
        kept = place[self.task] >= 0
        order = np.argsort(place[self.task[kept]], kind="stable")
        task, worker, label = (part[kept][order] for part in (place[self.task], self.worker, self.label))
        return Answers(len(tasks), self.n_workers, task, worker, label)


@dataclass(frozen=True)
class AnswerFile:
    """What answers.json says, labels not yet looked up: they need the classes.

    `tasks` are its ids in canonical form, `workers` as they are, in natural order; `answers.label` are positions in
    `labels`.
    """

    tasks: Sequence[str]
    workers: Sequence[str]
    labels: Sequence[int | str]
    answers: Answers


def look_up(file: AnswerFile, classes: Sequence[str], source: str = "answers.json") -> Answers:
    """The answers with `label` as index into `classes`: a label is an index, or a class name.

    Text of digits is an index, unless all text there names classes: of classes 1, 2 and 3 the texts 0, 1 and 2 are
    three indices, and not an index and two names.

    Raises:
        DataError: naming each label that is neither, with a task and a worker who gave it.
    """
    by_name = {composed(name): i for i, name in enumerate(classes)}
    if not all(composed(label) in by_name for label in file.labels if isinstance(label, str)):
        by_name = {name: i for name, i in by_name.items() if not DECIMAL.fullmatch(name)}
    index = np.full(len(file.labels), -1, dtype=np.int64)
    complaints = []
    for position, label in enumerate(file.labels):
        found = by_name.get(composed(label), label) if isinstance(label, str) else label
        if isinstance(found, str) and DECIMAL.fullmatch(found) and len(found) < 10:
            found = int(found)
        if isinstance(found, int) and 0 <= found < len(classes):
            index[position] = found
            continue
        first = int(np.flatnonzero(file.answers.label == position)[0])
        an_index = isinstance(found, int) and found >= 0
        rule = f"is not below n_classes={len(classes)}" if an_index else f"is not a class: {few(classes)}"
        complaints.append(
            f"{source}: task {short(file.tasks[file.answers.task[first]])}, "
            f"worker {short(file.workers[file.answers.worker[first]])}: label {short(str(label))} {rule}"
        )
    if complaints:
        raise DataError(*complaints)
    given = file.answers
    return Answers(given.n_tasks, given.n_workers, given.task, given.worker, index[given.label])


def majority_vote(answers: Answers, n_classes: int) -> Ints:
    """(tasks,): the label most workers gave; of several any one, always the same; -1 for a task without answers.

    Not the lowest: it would be wrong more often the lower the class is, and a classifier of such labels learns that.
    """
    pair, count = np.unique(answers.task * n_classes + answers.label, return_counts=True)
    task, label = np.divmod(pair, n_classes)
    order = np.lexsort((np.random.default_rng(0).random(len(pair)), count, task))  # a task's winner comes last
    vote = np.full(answers.n_tasks, -1, dtype=np.int64)
    vote[task[order]] = label[order]
    return vote
