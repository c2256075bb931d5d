"""Tables for people: one row per task, one row per worker."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from .dataset import Dataset
from .experiment import Inferred


def write_labels(path: Path, dataset: Dataset, inferred: Inferred) -> None:
    """labels.csv: per task the label that classifier and answers together make likeliest, and the majority's.

    `consensus_quality_score` in [0, 1]; a low one asks for a second look.
    """
    quality, label = (part.numpy() for part in inferred.posterior.max(1))
    majority = inferred.majority.numpy()
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["task", "consensus_label", "consensus_quality_score", "majority_label", "num_annotations"])
        at = 0
        for part in dataset.crowd:
            for task, count in zip(part.tasks, np.diff(part.answers.starts_at), strict=True):
                classes = dataset.classes[label[at]], dataset.classes[majority[at]]
                rows.writerow([task, classes[0], f"{quality[at]:.6f}", classes[1], count])
                at += 1


def write_workers(path: Path, dataset: Dataset, inferred: Inferred) -> None:
    """workers.csv: per worker its row in the model's `confusion`, its answers, and how often the consensus agrees."""
    label = inferred.posterior.argmax(1).numpy()
    given, agreed = np.zeros((2, len(dataset.workers)))
    at = 0
    for part in dataset.crowd:
        answers = part.answers
        right = answers.label == label[at + answers.task]
        given += np.bincount(answers.worker, minlength=len(given))
        agreed += np.bincount(answers.worker, weights=right, minlength=len(given))
        at += len(part.names)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["worker", "confusion_row", "num_examples_labeled", "agreement_with_consensus"])
        for row, worker in enumerate(dataset.workers):
            rows.writerow([worker, row, int(given[row]), f"{agreed[row] / given[row]:.6f}"])
