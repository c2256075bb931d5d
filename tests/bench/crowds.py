"""Crowds to measure on: real answers, simulated ones, and how a pair of seed and fold shares them out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from crowdlayer.answers import Answers, Ints
from crowdlayer.data.layout import belongs, read_dataset
from crowdlayer.learning.experiment import load_images
from crowdlayer.settings import DataSettings, TrainingSettings
from crowdlayer.storage.sync import sync
from tests.crowds import Crowd, mixed_crowd


@dataclass(frozen=True)
class Pool:
    """All that is known: images (n, size, size, 3) uint8 with true labels; those of `crowd` have answers."""

    n_classes: int
    crowd: Tensor
    truth: Ints
    answers: Answers
    labelled: Tensor
    labels: Ints


@dataclass(frozen=True)
class Share:
    """What one pair has: tasks to train on, tasks held out with their answers, true labels to choose by and to test."""

    n_classes: int
    train: Tensor
    truth: Ints
    answers: Answers
    held: Tensor
    held_answers: Answers
    val: Tensor
    val_labels: Tensor
    test: Tensor
    test_labels: Tensor


def read_pool(location: str, size: int) -> Pool:
    """A data set of the job's own layout, read by the job's own code."""
    with tempfile.TemporaryDirectory() as folder:
        synced = sync(location, Path(folder), belongs)
        answers = synced.root / "answers.json"
        data = read_dataset(synced.root, synced.digests, DataSettings(tasks=location), answers, None, 0)
        data, images = load_images(data, synced.root, TrainingSettings(img_size=size), 0, None)
        assert data.val is not None
        assert data.test is not None
        assert images.test is not None
        labelled = torch.cat([images.validation[:], images.test[:]])
        labels = np.concatenate([data.val.labels, data.test.labels])
        return Pool(len(data.classes), images.train[:], data.train.truth, data.train.answers, labelled, labels)


def patterns(n: int, n_classes: int, size: int, rng: np.random.Generator, noise: float = 1.0) -> tuple[Tensor, Ints]:
    """Images of smooth random patterns, one per class, shifted, faded and under noise; and their classes."""
    means = F.interpolate(
        torch.from_numpy(np.random.default_rng(0).normal(size=(n_classes, 3, 5, 5))), size=(size, size)
    )
    labels = rng.integers(n_classes, size=n)
    images = means[labels] * torch.from_numpy(rng.uniform(0.5, 1, (n, 1, 1, 1)))
    shifts = rng.integers(-2, 3, (n, 2))
    images = torch.stack(
        [image.roll(tuple(shift), (1, 2)) for image, shift in zip(images, shifts.tolist(), strict=True)]
    )
    images = images + noise * torch.from_numpy(rng.normal(size=tuple(images.shape)))
    return (images * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), labels


def pattern_pool(n: int, n_classes: int, size: int, rng: np.random.Generator) -> Pool:
    """`n` images with truth alone to be answered by a simulated crowd, and 3000 to choose by and to test."""
    crowd, truth = patterns(n, n_classes, size, rng)
    labelled, labels = patterns(3000, n_classes, size, rng)
    none = np.zeros(0, dtype=np.int64)
    return Pool(n_classes, crowd, truth, Answers(n, 1, none, none, none), labelled, labels)


def few_answers(n_workers: int, n_classes: int, rng: np.random.Generator) -> Crowd:
    """60 % right, the rest to a class's two neighbours and anywhere, alike for all workers: CIFAR-100N's worst."""
    eye = np.eye(n_classes)
    near = (np.roll(eye, 1, axis=1) + np.roll(eye, 2, axis=1)) / 2
    skill = rng.uniform(0.5, 0.7, (n_workers, 1, 1))
    return Crowd(skill * eye + (1 - skill) * (0.5 * near + 0.5 / n_classes))


def confused_pairs(n_workers: int, n_classes: int, rng: np.random.Generator) -> Crowd:
    """Each worker takes every second class for the next in 20 to 60 % of cases, and is else right in 95 %."""
    pair = np.eye(n_classes)[np.arange(n_classes) // 2 * 2 + 1]
    mixed = rng.uniform(0.2, 0.6, (n_workers, 1, 1))
    return Crowd(0.95 * ((1 - mixed) * np.eye(n_classes) + mixed * pair) + 0.05 / n_classes)


def frequencies(n_classes: int) -> npt.NDArray[np.float64]:
    """Of classes of which each is rarer than the one before, the last a tenth of the first."""
    falling = np.geomspace(1, 0.1, n_classes, dtype=np.float64)
    share: npt.NDArray[np.float64] = falling / falling.sum()
    return share


def guessers(n_workers: int, n_classes: int, rng: np.random.Generator) -> Crowd:
    """Each worker knows 50 to 90 % of the images and guesses the others, frequent classes more often than rare ones."""
    knows = rng.uniform(0.5, 0.9, (n_workers, 1, 1))
    return Crowd(knows * np.eye(n_classes) + (1 - knows) * frequencies(n_classes))


def unlike(pool: Pool, rng: np.random.Generator) -> Pool:
    """As many tasks of each class as `frequencies` says; of what chooses and tests, all classes as before."""
    share = frequencies(pool.n_classes)
    n = int(min(np.bincount(pool.truth, minlength=pool.n_classes) / share))
    tasks = [rng.permutation(np.flatnonzero(pool.truth == label))[: int(n * part)] for label, part in enumerate(share)]
    kept = np.sort(np.concatenate(tasks))
    return replace(pool, crowd=pool.crowd[kept], truth=pool.truth[kept], answers=pool.answers.of_tasks(kept))


SIMULATED: dict[str, tuple[Callable[[int, int, np.random.Generator], Crowd], int, int]] = {
    "spammers": (mixed_crowd, 30, 3),
    "pairs": (confused_pairs, 30, 3),
    "few": (few_answers, 150, 1),
    "unlike": (guessers, 30, 3),
}
"""How the answers come about, of how many workers, how many per task."""


def answered(truth: Ints, n_classes: int, condition: str, rng: np.random.Generator) -> Answers:
    """The answers of a crowd of SIMULATED to tasks of known truth."""
    make, n_workers, per_task = SIMULATED[condition]
    crowd = make(n_workers, n_classes, rng)
    worker = np.argsort(rng.random((len(truth), n_workers)), axis=1)[:, :per_task].ravel()
    task = np.repeat(np.arange(len(truth)), per_task)
    steps = crowd.confusion.cumsum(2)[worker, truth[task]]
    label = (rng.random((len(task), 1)) > steps / steps[:, -1:]).sum(1)
    return Answers(len(truth), n_workers, task, worker, label)


def at_most(answers: Answers, per_task: int, rng: np.random.Generator) -> Answers:
    """`per_task` answers of each task, drawn at random."""
    order = np.lexsort((rng.random(len(answers)), answers.task))
    rank = np.arange(len(answers)) - answers.starts_at[answers.task]
    kept = np.sort(order[rank < per_task])
    task, worker, label = answers.task[kept], answers.worker[kept], answers.label[kept]
    return Answers(answers.n_tasks, answers.n_workers, task, worker, label)


def share(pool: Pool, seed: int, fold: int, n_folds: int, n_train: int | None, per_task: int | None) -> Share:
    """Of pair (seed, fold): one fold of the tasks is held out, and of the others n_train are trained on.

    Of the labelled images a third chooses, at most 300, and the others are the test, at most 1000.
    """
    rng = np.random.default_rng((seed, 0))
    held, rest = _fold(rng.permutation(len(pool.truth)), fold, n_folds)
    val, test = _fold(rng.permutation(len(pool.labels)), fold % 3, 3)
    train = np.random.default_rng((seed, fold, 1)).permutation(rest)[:n_train]
    answers = pool.answers
    if per_task is not None:
        answers = at_most(answers, per_task, np.random.default_rng((seed, fold, 2)))
    held, val, test = held[: len(train) // 4], val[:300], test[:1000]
    labels = torch.from_numpy(pool.labels)
    return Share(
        pool.n_classes, pool.crowd[train], pool.truth[train], answers.of_tasks(train),
        pool.crowd[held], answers.of_tasks(held), pool.labelled[val], labels[val], pool.labelled[test], labels[test],
    )  # fmt: skip


def _fold(order: Ints, fold: int, n_folds: int) -> tuple[Ints, Ints]:
    """The fold, and the others."""
    parts = np.array_split(order, n_folds)
    return parts[fold], np.concatenate(parts[:fold] + parts[fold + 1 :])
