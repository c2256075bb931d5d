"""What the crowd is worth: how reliable each worker is, and which labels to look at again. Pure functions.

Everywhere a matrix is confusion[worker, true class, answered class].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..answers import Answers
from .consensus import Consensus, mean_share, shrunk, tensors

Z95 = 1.959964
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""


def reliability(posterior: Tensor, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """The probability that an answer of a worker is right, and its 95 % interval, (n_workers,) each.

    The estimate is the share of its answers that the posterior holds right, with two answers of the crowd's mean.
    The interval is Wilson's, for as many answers as the uncertain truth leaves them worth: with r the probability
    that an answer is right and p their mean, the share Σ r(1-r) / n p(1-p) of the information is missing (Louis 1982);
    that p with an answer more of each kind, for where all are right or wrong hardly anything is missing.
    """
    task, worker, label = tensors(answers)
    right = posterior[task, label]
    zero = torch.zeros(answers.n_workers, dtype=torch.float64)
    n = zero.index_add(0, worker, torch.ones_like(right))
    hits = zero.index_add(0, worker, right)
    share = hits / n.clamp_min(1)
    smooth = (hits + 1) / (n + 2)
    missing = zero.index_add(0, worker, right * (1 - right)) / (n * smooth * (1 - smooth)).clamp_min(1e-12)
    known = (n * (1 - missing.clamp(0, 1))).clamp_min(1e-3)  # never none: an interval of 0 to 1 is enough said
    centre = (share + Z95**2 / (2 * known)) / (1 + Z95**2 / known)
    half = Z95 / (1 + Z95**2 / known) * (share * (1 - share) / known + Z95**2 / (4 * known**2)).sqrt()
    return shrunk(hits, n, mean_share(hits, n)), (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)


def spammer_score(matrices: Tensor) -> Tensor:
    """(n_workers,) in [0, 1]: 1 for answers that do not depend on the class, 0 where each class has its own.

    One minus the score of Raykar & Yu ("Eliminating Spammers and Ranking Annotators", JMLR 2012): the mean squared
    distance of two rows, halved. A worker who mistakes classes always in the same way is no spammer.
    """
    n_classes = matrices.shape[1]
    # Σ_{c<d} |row_c − row_d|² = n Σ_c |row_c|² − |Σ_c row_c|²
    distance = n_classes * matrices.square().sum((1, 2)) - matrices.sum(1).square().sum(1)
    return (1 - distance / (n_classes * (n_classes - 1))).clamp(0, 1)


def worst_class(matrices: Tensor, seen: Tensor) -> Tensor:
    """(n_workers,): of the classes that a worker has seen, the one it recognises least often.

    `seen` (n_workers, true): its answers by true class.
    """
    recall = matrices.diagonal(dim1=1, dim2=2)
    return torch.where(seen >= 0.5, recall, recall + 2).argmin(1)


@dataclass(frozen=True)
class Workers:
    """Figures of each worker, (n_workers,) unless said otherwise.

    `n` answers; `quality`, the probability that one is right, from `low` to `high`; `agreement`, the share that agrees
    with the consensus; `worst`, the class recognised least often; `spam`, the spammer score; `order`, the worst first.
    """

    n: Tensor
    quality: Tensor
    low: Tensor
    high: Tensor
    agreement: Tensor
    worst: Tensor
    spam: Tensor
    order: Tensor


def judge_workers(found: Consensus, answers: Answers) -> Workers:
    """All figures of the workers."""
    task, worker, label = tensors(answers)
    n = torch.bincount(worker, minlength=answers.n_workers)
    agreed = torch.bincount(worker[found.posterior.argmax(1)[task] == label], minlength=answers.n_workers)
    quality, low, high = reliability(found.posterior, answers)
    counts, spam, worst = found.counts, torch.empty_like(quality), torch.empty_like(n)
    for some in counts.blocks(torch.arange(answers.n_workers)):
        matrices = counts.confusion(some)
        spam[some], worst[some] = spammer_score(matrices), worst_class(matrices, counts.seen[some])
    order = torch.from_numpy(np.lexsort((-n.numpy(), quality.numpy().round(6))))  # the last bits are a sum's order
    return Workers(n, quality, low, high, agreed / n.clamp_min(1), worst, spam, order)


@dataclass(frozen=True)
class Labels:
    """Figures of each task, (tasks,) each.

    `label`, the likeliest class; `score`, what the posterior gives it; `entropy` of the posterior in nats; `issue`,
    whether the majority's label is more likely wrong than right; `order`, the tasks to look at again first.
    """

    label: Tensor
    score: Tensor
    entropy: Tensor
    issue: Tensor
    order: Tensor


def judge_labels(posterior: Tensor, majority: Tensor) -> Labels:
    """All figures of the labels."""
    score, label = posterior.max(1)
    issue = label_issues(posterior, majority)
    return Labels(label, score, torch.special.entr(posterior).sum(1), issue, review_order(posterior, issue))


def label_issues(posterior: Tensor, majority: Tensor) -> Tensor:
    """(tasks,) bool: the majority's label is more likely wrong than right."""
    return torch.lt(posterior.gather(1, majority[:, None])[:, 0], 0.5)


def review_order(posterior: Tensor, issues: Tensor) -> Tensor:
    """(tasks,) tasks, those to look at again first: the label issues, then the others, each from low score to high."""
    return torch.from_numpy(np.lexsort((posterior.amax(1).numpy(), ~issues.numpy())))
