"""The chosen classifier's logits and the crowd's answers → its temperature, the labels, the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..answers import majority_vote
from ..data.dataset import Dataset
from . import metrics
from .consensus import CELLS, Consensus, answers_log_loss, consensus, predictive_temperature
from .quality import Labels, Workers, judge_labels, judge_workers

LESS = "lower N_PROCESSES, or give the job more memory"
"""What helps where there is too little for it: each process has its own."""


def matrices_of(dataset: Dataset) -> tuple[str, int]:
    """The workers' matrices, in words, and about the bytes that a process needs to judge the crowd once it has trained.

    Three times all matrices in float32: the likelihood, and the chosen epoch's, as trained and as kept. In float64,
    twice the counts, four figures per worker and class, and eight per task and class; and what is handled at once.
    """
    n_workers, n_classes, n_answers = len(dataset.workers), len(dataset.classes), len(dataset.answers)
    rows = 2 * min(n_answers, n_workers * n_classes) + 4 * n_workers + 8 * dataset.answers.n_tasks
    size = 12 * n_workers * n_classes**2 + 8 * (n_classes * rows + 8 * CELLS)
    return f"matrices of {n_workers} workers for {n_classes} classes", size


@dataclass(frozen=True)
class Predictions:
    """The chosen classifier's logits, (images, classes) each, in the order of the data set's parts.

    `unseen`: to the images trained on, those of classifiers that have not seen their answers, each divided by its own
    temperature, where FOLDS asks for it.
    """

    train: Tensor
    validation: Tensor
    test: Tensor | None
    unseen: Tensor | None = None


@dataclass(frozen=True)
class Inferred:
    """What classifier and answers together say about every task with answers, those trained on first.

    `majority` (tasks,) is the majority vote; `classifier` (tasks,) what the network says by itself that judged it;
    `temperature` that of the classifier on the images trained on, None where others judged them.
    """

    consensus: Consensus
    majority: Tensor
    classifier: Tensor
    temperature: float | None
    workers: Workers
    labels: Labels

    @property
    def posterior(self) -> Tensor:
        """P(true class | image, answers), (tasks, classes) float64."""
        return self.consensus.posterior


def infer(dataset: Dataset, predictions: Predictions, likelihood: Tensor) -> tuple[float, Inferred]:
    """The classifier's temperature, and what it and the answers say about every task with answers.

    `likelihood` is log P(answered | true, worker).
    """
    temperature, in_sample = temperatures(dataset, predictions, likelihood)
    logits = predictions.train / in_sample if predictions.unseen is None else predictions.unseen
    if dataset.held_out is not None:
        logits = torch.cat([logits, predictions.validation / temperature])
    answers = dataset.answers
    majority = torch.from_numpy(majority_vote(answers, len(dataset.classes)))
    found = consensus(logits, likelihood, answers)
    of_workers, of_labels = judge_workers(found, answers), judge_labels(found.posterior, majority)
    of_train = in_sample if predictions.unseen is None else None
    return temperature, Inferred(found, majority, logits.argmax(1), of_train, of_workers, of_labels)


def temperatures(dataset: Dataset, predictions: Predictions, likelihood: Tensor) -> tuple[float, float]:
    """The classifier's temperature, and that of its logits to the images that it was trained on.

    The temperature is fitted to the log-loss on val/; without val/, to that of the answers of the held-out tasks, given
    the workers' matrices that the other tasks show. `likelihood` is log P(answered | true, worker).
    """
    train, validation, answers = predictions.train, predictions.validation, dataset.train.answers
    if dataset.val is not None:
        labels = torch.from_numpy(dataset.val.labels)
        temperature = metrics.fitted_temperature(lambda t: metrics.cross_entropy(validation / t, labels), len(labels))
        return temperature, predictive_temperature(train, likelihood, answers, temperature)
    assert dataset.held_out is not None
    held = dataset.held_out.answers
    in_sample = predictive_temperature(train, likelihood, answers, 1.0)
    shown = consensus(train / in_sample, likelihood, answers).counts
    temperature = metrics.fitted_temperature(lambda t: answers_log_loss(validation / t, shown, held), held.n_tasks)
    return temperature, max(in_sample, temperature)


def calibration(dataset: Dataset, predictions: Predictions, temperature: float) -> dict[str, Any]:
    """ECE, Brier score and log-loss of val and test, `before` and `after` the temperature; None without true labels."""
    splits = {"val": (dataset.val, predictions.validation), "test": (dataset.test, predictions.test)}
    figures: dict[str, Any] = {}
    for split, (part, logits) in splits.items():
        figures[split] = None
        if part is not None and logits is not None:
            labels = torch.from_numpy(part.labels)
            figures[split] = {
                "before": metrics.calibration(logits, labels),
                "after": metrics.calibration(logits / temperature, labels),
            }
    return figures


def crowd_figures(dataset: Dataset, inferred: Inferred) -> dict[str, float | None]:
    """Percent right, of the tasks whose true class is known from train/'s folders; None where none is.

    `train_accuracy` of the inferred labels, `majority_vote_accuracy` of the majority's, `answer_accuracy` of single
    answers; and `majority_vote_agreement`, the percent of all tasks where the inferred label is the majority's.
    """
    truth = torch.from_numpy(dataset.truth)
    known = truth >= 0
    label = inferred.posterior.argmax(1)
    right = [
        (part.answers.label == part.truth[part.answers.task])[part.truth[part.answers.task] >= 0]
        for part in dataset.crowd
    ]
    answers = np.concatenate(right)
    return {
        "train_accuracy": metrics.accuracy(label[known], truth[known]) if known.any() else None,
        "majority_vote_accuracy": metrics.accuracy(inferred.majority[known], truth[known]) if known.any() else None,
        "answer_accuracy": 100 * float(answers.mean()) if len(answers) else None,
        "majority_vote_agreement": metrics.accuracy(label, inferred.majority),
    }
