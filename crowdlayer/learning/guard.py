"""Whether a run collapses: few classes predicted, and little in common with the answers; and what to do then.

With many classes and few answers the matrices can explain the answers without the classifier, which then learns next to
nothing: on 100 classes, one answer each and 40 % noise it comes to 6 % where majority vote's labels give 57
(docs/quality.md).
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ..answers import Answers, majority_vote
from ..data.pixels import sent
from ..machine.processes import Processes
from ..settings import TrainingSettings

log = logging.getLogger(__name__)

LOW = 0.5
"""A share of what majority vote has; an epoch is suspicious in which agreement and diversity are both below."""
PATIENCE = 3, 0.1
"""So many suspicious epochs in a row, and so large a part of all epochs, are a collapse …"""
GROWTH, FLOOR = 2.0, 0.02
"""… unless diversity grows meanwhile by that factor, from its lowest: then the classifier is only slow, and the count
starts again. Below the floor, a share of majority vote's, it is all the same."""

TOGETHER = 32
"""So many steps are counted together: one by one, each would be ten kernels of a GPU."""


def fallback(settings: TrainingSettings) -> TrainingSettings:
    """The settings that a collapsed run starts again with: row-stochastic matrices, held where Dawid-Skene puts them.

    Of what was measured against a classifier of majority vote's labels (simulated crowds, five pairs each, points of
    test accuracy) this alone was never below: 100 classes with one answer +3.1 ± 1.8, spammers +21.7 ± 3.5, confused
    pairs +2.1 ± 1.5.
    """
    change = {
        "crowd_layer": "stochastic",
        "crowd_start": "dawid-skene",
        "crowd_warmup": settings.n_epochs,
        "scale": 0.0,
    }
    return settings.model_copy(update=change)


class Guard:
    """Watches what the classifier predicts while it learns; the sums of all processes count.

    Agreement is Cohen's κ between prediction and answer, so 0 by chance; diversity the effective number of classes,
    e to the entropy of what is predicted, less 1. Each is compared to majority vote's.
    """

    def __init__(self, answers: Answers, n_classes: int, n_epochs: int, processes: Processes) -> None:
        self.processes = processes
        self.patience = max(PATIENCE[0], math.ceil(PATIENCE[1] * n_epochs))
        self.suspicious_since: int | None = None
        self._lowest = 0.0
        label = torch.from_numpy(answers.label)
        self._answered = shares(label.bincount(minlength=n_classes))
        majority = torch.from_numpy(majority_vote(answers, n_classes))
        voted = majority[majority >= 0].bincount(minlength=n_classes)
        agreed = (majority[torch.from_numpy(answers.task)] == label).sum()
        self.majority = self._figures(voted, agreed, len(label))
        self._seen = nothing(n_classes)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self.figures: dict[str, float] = {}
        """Of the last epoch that was judged, under their names in results.csv."""

    def see(self, logits: Tensor, task: Tensor, label: Tensor) -> None:
        """One process's share of a step: (tasks, classes) logits, and its (answers,) tasks and labels."""
        self._waiting.append((logits.detach().argmax(1), task, label))
        if len(self._waiting) == TOGETHER:
            self._count()

    def _count(self) -> None:
        """Count what has been seen."""
        if not self._waiting:
            return
        predictions, tasks, labels = zip(*self._waiting, strict=True)
        self._waiting = []
        predicted, label = torch.cat(predictions), torch.cat(labels)
        n = torch.tensor([len(part) for part in predictions])
        before = torch.repeat_interleave(n.cumsum(0) - n, torch.tensor([len(part) for part in tasks]))
        seen = self._seen.to(predicted.device)
        seen[:-2].index_add_(0, predicted, torch.ones_like(predicted))
        seen[-2].add_((predicted[torch.cat(tasks) + sent(before, predicted.device)] == label).sum())
        seen[-1].add_(len(label))
        self._seen = seen

    def collapsed(self, epoch: int) -> bool:
        """The verdict after `epoch` (from 1): since `suspicious_since`, or not. Collective."""
        self._count()
        seen = self.processes.gather(self._seen.unsqueeze(0)).sum(0)
        agreement, diversity = self._figures(seen[:-2], seen[-2], int(seen[-1]))
        self._seen = nothing(len(seen) - 2)
        self.figures = {"crowd/agreement": agreement, "crowd/diversity": diversity}
        if agreement >= LOW * self.majority[0] or diversity >= LOW * self.majority[1]:
            self.suspicious_since = None
            return False
        floored = max(diversity, FLOOR * self.majority[1])
        if self.suspicious_since is None or floored > GROWTH * self._lowest:
            self.suspicious_since, self._lowest = epoch, floored
        self._lowest = min(self._lowest, floored)  # the first epochs predict many classes, by chance
        log.info(
            "epoch %d: the classifier predicts %.1f classes where majority vote has %.1f, and its agreement with the "
            "answers (Cohen's kappa) is %.2f where majority vote's is %.2f",
            epoch, diversity + 1, self.majority[1] + 1, agreement, self.majority[0],
        )  # fmt: skip
        return epoch - self.suspicious_since + 1 >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What the next verdict depends on; collective."""
        self._count()
        seen = self.processes.gather(self._seen.unsqueeze(0)).sum(0)
        return {"suspicious_since": self.suspicious_since, "lowest": self._lowest, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on any number of processes: the first has all the sums."""
        self.suspicious_since, self._lowest = state["suspicious_since"], state["lowest"]
        self._waiting = []
        self._seen = state["seen"] if self.processes.index == 0 else torch.zeros_like(state["seen"])

    def _figures(self, predicted: Tensor, agreed: Tensor, n_answers: int) -> tuple[float, float]:
        """Agreement and diversity of (classes,) counts of predictions."""
        share = shares(predicted)
        chance = float(share @ self._answered)
        agreement = (float(agreed) / max(n_answers, 1) - chance) / max(1 - chance, 1e-9)
        return agreement, float(torch.special.entr(share).sum().exp()) - 1


def nothing(n_classes: int) -> Tensor:
    """No prediction of any class, then no answer that agrees with its task's, then no answer."""
    return torch.zeros(n_classes + 2, dtype=torch.int64)


def shares(counts: Tensor) -> Tensor:
    """(classes,) counts → float64 shares of their sum."""
    return counts.double() / counts.sum().clamp_min(1)
