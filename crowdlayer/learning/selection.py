"""What SELECT_BY makes of an epoch."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..answers import Answers
from . import metrics
from .crowd_layer import WorkerModel
from .crowd_model import CrowdLoss

log = logging.getLogger(__name__)

NOTEWORTHY = 5.0
"""Percent of validation accuracy that a rule may give away without a word."""
CELLS = 2**24
"""Of workers' matrices, at most so many are gathered at once: all answers' would be classes² for each."""
Rule = Literal["loss", "accuracy", "calibrated_loss", "last"]


def by_labels(logits: Tensor, labels: Tensor, rule: Rule) -> tuple[float, float, dict[str, float]]:
    """The cross-entropy on (images,) true labels, what `rule` makes of it (less is better), and all figures."""
    figures = metrics.evaluation(logits, labels, "val")
    if rule == "accuracy":
        return figures["val_loss"], -figures["val_accuracy"], figures

    def at(temperature: float) -> float:
        return metrics.cross_entropy(logits / temperature, labels)

    return figures["val_loss"], _score(figures["val_loss"], at, rule), figures


def by_answers(logits: Tensor, answers: Answers, model: WorkerModel, rule: Rule) -> tuple[float, float]:
    """The crowd loss of the answers to held-out tasks, and what `rule` makes of it; less is better."""
    model = copy.deepcopy(model).cpu()
    at_once = max(1, CELLS // logits.shape[1] ** 2)
    task, worker, label = (torch.from_numpy(part) for part in (answers.task, answers.worker, answers.label))
    parts = [slice(at, at + at_once) for at in range(0, len(answers), at_once)]
    criterion = CrowdLoss("task")

    def at(temperature: float) -> float:
        total = 0.0
        for part in parts:
            of_answers = logits[task[part]] / temperature
            scores = model(of_answers, torch.arange(len(of_answers)), worker[part])
            total += float(criterion(scores, label[part], answers.n_tasks))
        return total

    loss = at(1.0)
    return loss, _score(loss, at, rule)


def _score(loss: float, at: Callable[[float], float], rule: Rule) -> float:
    return metrics.calibrated(at) if rule == "calibrated_loss" and math.isfinite(loss) else loss


def log_choice(epoch: int, accuracy: float | None, accuracies: Sequence[float | None], rule: Rule) -> None:
    """Say so where another rule would have chosen a much better epoch: a loss punishes over-confidence first.

    `accuracies`: percent on val/ of each epoch; `accuracy` that of the chosen one.
    """
    known = [(value, number) for number, value in enumerate(accuracies, 1) if value is not None]
    if accuracy is not None and known and max(known)[0] - accuracy >= NOTEWORTHY:
        log.warning(
            "SELECT_BY=%s chose epoch %d with val_accuracy %.1f %%, epoch %d has %.1f %%: consider SELECT_BY=%s",
            rule, epoch, accuracy, *max(known)[::-1], others(rule, with_truth=True),
        )  # fmt: skip


def others(rule: Rule, *, with_truth: bool) -> str:
    """The rules to consider in the place of `rule`; without true labels there is nothing better than the last epoch."""
    if not with_truth:
        return "last"
    return " or ".join(name for name in ("accuracy", "calibrated_loss") if name != rule)
