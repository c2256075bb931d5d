"""What the answers alone say: Dawid & Skene's model of workers and true classes, by EM; and where workers start."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..answers import Answers
from ..settings import TrainingSettings
from .crowd_layer import WORKER_MODELS, WorkerModel

log = logging.getLogger(__name__)

STRENGTH, RIGHT = 10.0, 0.7
"""The prior of a worker's row: so many imaginary answers, of which this share is right and the rest spread evenly.

Chosen on CIFAR-10N and LabelMe, where from 5 on no crowd ends below majority vote. It must not be learnt: with one
answer per task nothing tells workers from classes, and EM with the crowd's own rows as the prior wandered from 82 %
right to 11 %.
"""
MAX_ROUNDS = 100
ROWS_FROM = 10_000_000
"""CROWD_UPDATES=auto: from so many numbers on, a dense step costs what the crowd's size costs, not its answers."""
SETTLED = 1e-3
"""EM ends when a round moves less probability than this, in the mean over tasks."""


@dataclass(frozen=True)
class DawidSkene:
    """`posterior` (tasks, classes) of the true class; `confusion` (n_workers, true, answered), all above 0."""

    posterior: Tensor
    confusion: Tensor


@torch.no_grad()
def dawid_skene(answers: Answers, n_classes: int) -> DawidSkene:
    """Dawid & Skene's EM ("Maximum Likelihood Estimation of Observer Error-Rates", 1979), from the vote shares.

    Each worker's rows have a prior of `STRENGTH` imaginary answers, so who answered little is taken for a fair worker.
    The only answer of a task is right with no less than `RIGHT`: nothing contradicts it, and all that EM has against it
    is that another class is more frequent, of which it would make an error in the end, and leave no rarer class. Tasks
    without answers get the classes' shares. Float32; time is linear in answers × classes.
    """
    cells = answers.n_workers * n_classes
    # Sums over answers as embedding bags, one pass each, of 32-bit indices where they suffice.
    index = torch.int32 if max(cells, len(answers), answers.n_tasks) < 2**31 else torch.int64
    task, worker, label = (torch.from_numpy(part).to(index) for part in (answers.task, answers.worker, answers.label))
    of_task = torch.from_numpy(answers.starts_at[:-1]).to(index)
    cell = worker * n_classes + label  # (answers,): who said what
    by_cell = torch.argsort(cell, stable=True)
    task_by_cell = task[by_cell]
    of_cell = F.pad(torch.bincount(cell, minlength=cells).cumsum(0), (1, 0))[:-1].to(index)

    votes = F.embedding_bag(label, torch.eye(n_classes), of_task, mode="sum")
    alone = torch.nonzero(votes.sum(1) == 1).squeeze(1)
    said = label[of_task[alone].long()].long()
    answered = votes.sum(1, keepdim=True) > 0
    posterior = torch.where(answered, votes / votes.sum(1, keepdim=True).clamp_min(1), 1 / n_classes)
    for _ in range(MAX_ROUNDS):
        counts = F.embedding_bag(task_by_cell, posterior, of_cell, mode="sum")
        confusion = smoothed(counts.view(answers.n_workers, n_classes, n_classes).transpose(1, 2))
        shares = (posterior.sum(0) + 1) / (answers.n_tasks + n_classes)
        evidence = F.embedding_bag(cell, confusion.log().transpose(1, 2).reshape(cells, n_classes), of_task, mode="sum")
        before, posterior = posterior, _believed(normalised_(evidence.add_(shares.log())), alone, said)
        if float(before.sub_(posterior).abs_().sum()) < SETTLED * answers.n_tasks:
            break
    return DawidSkene(posterior, confusion)


def _believed(posterior: Tensor, alone: Tensor, said: Tensor) -> Tensor:
    """In place: the tasks `alone` have what was `said` of them with no less than `RIGHT`, the others' ratios stay."""
    own = posterior[alone, said]
    doubted = own < RIGHT
    alone, said, own = alone[doubted], said[doubted], own[doubted]
    posterior[alone] *= ((1 - RIGHT) / (1 - own)).unsqueeze(1)
    posterior[alone, said] = RIGHT
    return posterior


def normalised_(logs: Tensor) -> Tensor:
    """softmax(1), in place: torch's own takes three times as long for rows as short as these."""
    probabilities = logs.sub_(logs.amax(1, keepdim=True)).exp_()
    return probabilities.div_(probabilities.sum(1, keepdim=True))


def smoothed(counts: Tensor) -> Tensor:
    """Expected counts (n_workers, true, answered) → the posterior mean of P(answer | truth) under the prior."""
    n_classes = counts.shape[1]
    prior = torch.full((n_classes, n_classes), (1 - RIGHT) / (n_classes - 1)).fill_diagonal_(RIGHT)
    total = counts + STRENGTH * prior
    return total / total.sum(2, keepdim=True)


def started(settings: TrainingSettings, answers: Answers, n_classes: int) -> WorkerModel:
    """The worker model that CROWD_LAYER names, started as CROWD_START says."""
    model = WORKER_MODELS[settings.crowd_layer](answers.n_workers, n_classes)
    if settings.crowd_start == "dawid-skene":
        model.start_at(dawid_skene(answers, n_classes).confusion)
    wanted = {"dense": False, "rows": True, "auto": sum(p.numel() for p in model.parameters()) >= ROWS_FROM}
    # A regulariser that looks at every worker has a gradient for every worker.
    model.row_wise = wanted[settings.crowd_updates] and (settings.scale == 0 or settings.regularizer == "geo-f")
    if settings.crowd_updates == "rows" and not model.row_wise:
        log.warning(
            "CROWD_UPDATES=rows is not kept: REGULARIZER=%s moves every worker in each step", settings.regularizer
        )
    if model.row_wise:
        # as they are; torch 2.11 warns where nobody has said it
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    return model
