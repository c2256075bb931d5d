"""Small real data sets in the contract's layout: scikit-learn's digits, labelled by a simulated crowd."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from crowdlayer.answers import Answers


@dataclass(frozen=True)
class Crowd:
    """Simulated workers: `confusion` (workers, true class, answered class), rows sum to 1."""

    confusion: npt.NDArray[np.float64]

    def answers(
        self, truth: Sequence[int] | npt.NDArray[np.int64], per_task: int, rng: np.random.Generator
    ) -> list[dict[str, int]]:
        """Each task's {worker: label}, from `per_task` workers drawn without replacement."""
        n_workers, n_classes, _ = self.confusion.shape
        return [
            {
                str(worker): int(rng.choice(n_classes, p=self.confusion[worker, label]))
                for worker in sorted(rng.choice(n_workers, size=min(per_task, n_workers), replace=False))
            }
            for label in truth
        ]


def mixed_crowd(n_workers: int, n_classes: int, rng: np.random.Generator) -> Crowd:
    """Of ten workers: five good (80-95 %), two fair (50-70 %) who mix up neighbours, two spammers, one adversary.

    Spammers answer at random or always the same; the adversary takes each class for the next.
    """
    uniform, following = np.full((n_classes, n_classes), 1 / n_classes), np.roll(np.eye(n_classes), 1, axis=1)
    matrices = []
    for worker in range(n_workers):
        match worker % 10:
            case 0 | 1 | 2 | 3 | 4:
                skill = rng.uniform(0.8, 0.95)
                matrices.append(skill * np.eye(n_classes) + (1 - skill) * uniform)
            case 5 | 6:
                skill = rng.uniform(0.5, 0.7)
                matrices.append(skill * np.eye(n_classes) + (1 - skill) * following)
            case 7:
                matrices.append(uniform)
            case 8:
                matrices.append(np.tile(np.eye(n_classes)[rng.integers(n_classes)], (n_classes, 1)))
            case _:
                matrices.append(0.9 * following + 0.1 * uniform)
    return Crowd(np.stack(matrices))


@dataclass(frozen=True)
class Simulated:
    """A crowd whose truth is known, on a classifier that knows nothing of the answers."""

    truth: npt.NDArray[np.int64]
    confusion: npt.NDArray[np.float64]
    answers: Answers
    logits: torch.Tensor


def simulate(
    seed: int,
    *,
    n_classes: int = 10,
    n_tasks: int = 1000,
    n_workers: int = 30,
    per_task: int = 3,
    signal: float = 2.5,
    overconfidence: float = 1.0,
) -> Simulated:
    """A mixed crowd; the images are normal noise with `signal` in the true class's place, so signal · image are the
    logits of a classifier that is calibrated, but for `overconfidence`, which multiplies them."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(n_classes, size=n_tasks)
    confusion = mixed_crowd(n_workers, n_classes, rng).confusion
    several = rng.integers(n_workers, size=(n_tasks, per_task))
    while (twice := (np.diff(np.sort(several), axis=1) == 0).any(1)).any():  # nobody answers a task twice
        several[twice] = rng.integers(n_workers, size=(twice.sum(), per_task))
    worker, task = several.ravel(), np.repeat(np.arange(n_tasks), per_task)
    chance = rng.random((len(worker), 1))
    label = (confusion[worker, truth[task]].cumsum(1) < chance).sum(1).clip(max=n_classes - 1)
    images = rng.standard_normal((n_tasks, n_classes))
    images[np.arange(n_tasks), truth] += signal
    logits = torch.from_numpy(overconfidence * signal * images)
    return Simulated(truth, confusion, Answers(n_tasks, n_workers, task, worker, label), logits)


def start(crowd: Simulated, certainty: float = 1.0) -> torch.Tensor:
    """The likelihood of a layer that is near its start, the identity."""
    n_workers, n_classes, _ = crowd.confusion.shape
    return (certainty * torch.eye(n_classes, dtype=torch.float64)).repeat(n_workers, 1, 1).log_softmax(2)


def answers_of(rows: list[tuple[int, int, int]], n_tasks: int, n_workers: int) -> Answers:
    task, worker, label = np.array(sorted(rows)).T.copy()
    return Answers(n_tasks, n_workers, task, worker, label)


def write_digits(
    root: Path,
    *,
    n_train: int = 1200,
    n_val: int = 200,
    n_test: int = 397,
    n_workers: int = 30,
    per_task: int = 3,
    seed: int = 0,
) -> Path:
    """scikit-learn's handwritten digits (1797 real 8×8 images of 10 classes) as PNG files, with a mixed crowd."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    pixels = (digits.images / 16 * 255).round().astype(np.uint8)
    rows = np.split(order[: n_train + n_val + n_test], [n_train, n_train + n_val])
    for split, chosen in zip(("train", "val", "test"), rows, strict=True):
        for task, row in enumerate(chosen):
            folder = root / split / str(digits.target[row])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(folder / f"digit-{task}.png")
    votes = mixed_crowd(n_workers, 10, rng).answers(digits.target[rows[0]], per_task, rng)
    (root / "answers.json").write_text(json.dumps({str(task): vote for task, vote in enumerate(votes)}))
    (root / "metadata.json").write_text(
        json.dumps({"name": "digits", "n_classes": 10, "n_workers": n_workers, "n_tasks": n_train})
    )
    return root


def write_shapes(
    root: Path, *, n_train: int = 24, n_val: int = 9, n_test: int = 9, size: int = 16, seed: int = 0
) -> Path:
    """The smallest data set that can be learnt: noisy red, green and blue squares, four workers, the last a spammer."""
    rng = np.random.default_rng(seed)
    names = ("blue", "green", "red")
    answers = {}
    for split, n in (("train", n_train), ("val", n_val), ("test", n_test)):
        for task in range(n):
            label = task % 3
            image = rng.integers(0, 80, (size, size, 3))
            image[..., 2 - label] += 150
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(folder / f"square-{task}.png")
            if split == "train":
                given = {str(worker): label for worker in range(3) if rng.random() < 0.8}
                answers[str(task)] = given | {"3": int(rng.integers(3))}
    (root / "answers.json").write_text(json.dumps(answers))
    return root


HOSTILE_CLASSES = {
    "blue": "<img src=x onerror=alert(1)>",
    "green": "=cmd|' &amp; {{7*7}}",
    "red": 'r"><script>alert(2)<!--',
}
HOSTILE_WORKERS = {
    "0": "</script><script>alert(3)</script>",
    "1": "@SUM(1+1)*cmd",
    "2": "'\"><b onmouseover=alert(4)>",
    "3": "spammer \u202e `${alert(5)}`",
}


def write_hostile_shapes(root: Path) -> Path:
    """`write_shapes`, where classes and workers have names that would be tags, scripts and formulas."""
    write_shapes(root, n_train=45)
    for split in ("train", "val", "test"):
        for name, hostile in HOSTILE_CLASSES.items():
            (root / split / name).rename(root / split / hostile)
    answers = json.loads((root / "answers.json").read_text())
    for task, votes in answers.items():
        answers[task] = {HOSTILE_WORKERS[worker]: label for worker, label in votes.items()}
    (root / "answers.json").write_text(json.dumps(answers))
    return root
