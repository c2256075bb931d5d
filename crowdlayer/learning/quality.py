"""What the crowd is worth: how reliable each worker is, and which labels to look at again. Pure functions.

They rest on the classifier's logits and on a likelihood log P(answered | true class, worker), whatever worker model it
comes from. Everywhere a matrix is confusion[worker, true class, answered class].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..answers import Answers

PRIOR = 10.0
"""So many answers per true class weighs what is believed of a worker before its answers to that class are seen."""
ROUNDS = 5
"""Rounds of `consensus`: on simulated crowds its figures hardly move after three, from a poor start after five."""
Z95 = 1.959964
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""
LEAST = -30.0
"""The least log-probability of an answer: nobody is quite sure to give none like it."""
CHUNK = 2**19
"""Answers handled at once: what is held beside the results is a few times (CHUNK, classes) float64."""
ANSWERS_TO_FIT = 100_000
"""So many answers are enough to fit a temperature."""
FACTORS = tuple(2 ** (step / 2) for step in range(18))
"""The temperatures tried, in units of the least one, which may be 0.05: 1, 1.4, 2 … 362; between two little changes."""

Evidence = Callable[[slice], Tensor]
"""For a slice of the answers, log P(answer | true class), (answers, classes)."""


@dataclass(frozen=True)
class Consensus:
    """What classifier and answers say together.

    `posterior` (tasks, classes) is P(true class | image, answers), float64. `counts` (n_workers, true, answered) are
    each worker's answers, shared out over the true classes by the posterior: they sum to the number of its answers.
    """

    posterior: Tensor
    counts: Tensor


def consensus(logits: Tensor, likelihood: Tensor, answers: Answers, rounds: int = ROUNDS) -> Consensus:
    """Labels and workers' matrices that fit each other, started from a worker model's likelihood.

    Bayes' rule with the classifier as the prior gives a posterior, its counts give the workers' matrices, these a
    better posterior, and so on (Dawid & Skene 1979, with images). A task is judged by matrices from which its own
    answers are taken out (the collapsed variational Bayes of Asuncion et al. 2009): else an answer would testify to
    its own worth, and certainty would grow out of nothing.

    Args:
        logits: (tasks, classes), divided by their temperature.
        likelihood: log P(answered | true, worker), (n_workers, true, answered). Where it is poor, as that of a layer
            still near its start, the rounds mend it.
        answers: to these tasks.
    """
    prior = logits.double().log_softmax(1)
    posterior = _bayes(prior, _as_given(likelihood, answers), answers).softmax(1)
    for _ in range(rounds):
        posterior = _bayes(prior, _as_others_show(posterior, answers), answers).softmax(1)
    return Consensus(posterior, _counts(posterior, answers))


def confusion(counts: Tensor) -> Tensor:
    """P(answered | true, worker), (n_workers, true, answered): the counts and `expected`, which weighs PRIOR answers.

    A class that a worker has hardly seen is thus judged by how it does elsewhere.
    """
    return expected(counts).mul_(PRIOR).add_(counts).div_(counts.sum(2, keepdim=True) + PRIOR)  # they may be gigabytes


def expected(counts: Tensor) -> Tensor:
    """What a worker's matrix would be if it were as good at every class, and erred as the crowd does.

    On the diagonal the worker's reliability; beside it the crowd's errors, (n_workers, true, answered).
    """
    right = _shrunk(counts.diagonal(dim1=1, dim2=2).sum(1), counts.sum((1, 2)))
    matrices = torch.mul((1 - right)[:, None, None], _errors(counts.sum(0)), out=torch.empty_like(counts))
    matrices.diagonal(dim1=1, dim2=2)[:] = right[:, None]
    return matrices


def reliability(posterior: Tensor, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """The probability that an answer of a worker is right, and its 95 % interval, (n_workers,) each.

    The estimate is the share of its answers that the posterior holds right, with two answers of the crowd's mean.
    The interval is Wilson's, for as many answers as the uncertain truth leaves them worth: with r the probability
    that an answer is right and p their mean, the share Σ r(1-r) / n p(1-p) of the information is missing (Louis 1982);
    that p with an answer more of each kind, for where all are right or wrong hardly anything is missing.
    """
    task, worker, label = _tensors(answers)
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
    return _shrunk(hits, n), (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)


def spammer_score(matrices: Tensor) -> Tensor:
    """(n_workers,) in [0, 1]: 1 for answers that do not depend on the true class, 0 for matrices of zeros and ones.

    One minus the score of Raykar & Yu ("Eliminating Spammers and Ranking Annotators", JMLR 2012): the mean squared
    distance of two rows, halved. A worker who mistakes classes always in the same way is no spammer.
    """
    n_classes = matrices.shape[1]
    # Σ_{c<d} |row_c − row_d|² = n Σ_c |row_c|² − |Σ_c row_c|²
    distance = n_classes * matrices.square().sum((1, 2)) - matrices.sum(1).square().sum(1)
    return (1 - distance / (n_classes * (n_classes - 1))).clamp(0, 1)


def worst_class(matrices: Tensor, counts: Tensor) -> Tensor:
    """(n_workers,): of the classes that a worker has seen, the one it recognises least often."""
    recall = matrices.diagonal(dim1=1, dim2=2)
    seen = counts.sum(2) >= 0.5
    return torch.where(seen, recall, recall + 2).argmin(1)


@dataclass(frozen=True)
class Workers:
    """Figures of each worker, (n_workers,) unless said otherwise.

    `n` answers; `quality`, the probability that one is right, from `low` to `high`; `agreement`, the share that agrees
    with the consensus; `worst`, the class recognised least often; `spam`, the spammer score; `matrices`
    (n_workers, true, answered); `order`, the worst first.
    """

    n: Tensor
    quality: Tensor
    low: Tensor
    high: Tensor
    agreement: Tensor
    worst: Tensor
    spam: Tensor
    matrices: Tensor
    order: Tensor


def judge_workers(found: Consensus, answers: Answers) -> Workers:
    """All figures of the workers."""
    task, worker, label = _tensors(answers)
    n = torch.bincount(worker, minlength=answers.n_workers)
    agreed = torch.bincount(worker[found.posterior.argmax(1)[task] == label], minlength=answers.n_workers)
    quality, low, high = reliability(found.posterior, answers)
    matrices = confusion(found.counts)
    spam, worst = spammer_score(matrices), worst_class(matrices, found.counts)
    order = torch.from_numpy(np.lexsort((-n.numpy(), quality.numpy())))
    return Workers(n, quality, low, high, agreed / n.clamp_min(1), worst, spam, matrices, order)


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


def answers_log_loss(logits: Tensor, likelihood: Tensor, answers: Answers) -> float:
    """-log P(answers | images) per task, in nats: the loss of a classifier where only answers are known.

    `likelihood`: log P(answered | true, worker), (n_workers, true, answered).
    """
    scores = _bayes(logits.double().log_softmax(1), _as_given(likelihood, answers), answers)
    return -float(scores.logsumexp(1).mean())


def label_issues(posterior: Tensor, majority: Tensor) -> Tensor:
    """(tasks,) bool: the majority's label is more likely wrong than right."""
    return torch.lt(posterior.gather(1, majority[:, None])[:, 0], 0.5)


def review_order(posterior: Tensor, issues: Tensor) -> Tensor:
    """(tasks,) tasks, those to look at again first: the label issues, then the others, each from low score to high."""
    return torch.from_numpy(np.lexsort((posterior.amax(1).numpy(), ~issues.numpy())))


def predictive_temperature(logits: Tensor, likelihood: Tensor, answers: Answers, least: float) -> float:
    """The temperature, `least` or more, with which the classifier best predicts each answer beside the others.

    The criterion, the mean of log P(answer | image, the task's other answers), needs no true label. Of the images that
    a classifier was trained on it is too sure, and it predicts their answers, which it has learnt, too well for the
    criterion to see all of that: the posterior is an upper bound. Where no task has two answers `least` comes out.
    """
    chosen = np.flatnonzero(np.diff(answers.starts_at) > 1)
    share = ANSWERS_TO_FIT / max(len(answers), 1)
    if share < 1:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[: round(share * len(chosen))])
    if len(chosen) == 0:
        return least
    rows, sample = torch.from_numpy(chosen), answers.of_tasks(chosen)
    best, found, worse = -math.inf, least, 0
    for temperature in (least * factor for factor in FACTORS):
        rated = _predicts(logits[rows] / temperature, likelihood, sample)
        best, found, worse = (rated, temperature, 0) if rated > best else (best, found, worse + 1)
        if worse == 2:  # it has one peak
            break
    return found


def _predicts(logits: Tensor, likelihood: Tensor, answers: Answers) -> float:
    """The sum over the answers of log P(answer | image, the task's other answers)."""
    found = consensus(logits, likelihood, answers)
    evidence = _as_others_show(found.posterior, answers)
    scores = _bayes(logits.double().log_softmax(1), evidence, answers)
    total = 0.0
    for rows in _chunks(answers):
        ours = evidence(rows)
        without = (scores[torch.from_numpy(answers.task[rows])] - ours).log_softmax(1)
        total += float((without + ours).logsumexp(1).sum())
    return total


def _bayes(log_prior: Tensor, evidence: Evidence, answers: Answers) -> Tensor:
    """(tasks, classes): log P(true class, answers | image)."""
    scores = log_prior.clone()
    for rows in _chunks(answers):
        scores.index_add_(0, torch.from_numpy(answers.task[rows]), evidence(rows))
    return scores


def _as_given(likelihood: Tensor, answers: Answers) -> Evidence:
    """The answers under the worker model's matrices."""

    def evidence(rows: slice) -> Tensor:
        _, worker, label = _tensors(answers, rows)
        return likelihood[worker, :, label].double().clamp_min(LEAST)

    return evidence


def _as_others_show(posterior: Tensor, answers: Answers) -> Evidence:
    """The answers under the matrices that each worker's answers to other tasks show."""
    counts = _counts(posterior, answers)
    seen = counts.new_zeros(counts.shape[:2])  # sums of `counts`, which may have many empty cells
    crowd, right_ones = counts.new_zeros(counts.shape[1:]), counts.new_zeros(len(counts))
    for rows in _chunks(answers):
        task, worker, label = _tensors(answers, rows)
        seen.index_add_(0, worker, posterior[task])
        crowd.index_add_(0, label, posterior[task])
        right_ones.index_add_(0, worker, posterior[task, label])
    reliable, errors = _shrunk(right_ones, seen.sum(1)), _errors(crowd.T)

    def evidence(rows: slice) -> Tensor:
        task, worker, label = _tensors(answers, rows)
        own, right = posterior[task], reliable[worker][:, None]
        before = ((1 - right) * errors.T[label]).scatter(1, label[:, None], right)  # what `expected` is for these
        alike = (counts[worker, :, label] - own).clamp_min(0) + PRIOR * before
        return (alike / ((seen[worker] - own).clamp_min(0) + PRIOR)).log()

    return evidence


def _counts(posterior: Tensor, answers: Answers) -> Tensor:
    """Each worker's answers by true and answered class, (n_workers, true, answered), shared out by the posterior."""
    n_classes = posterior.shape[1]
    counts = torch.zeros(answers.n_workers * n_classes, n_classes, dtype=torch.float64)  # [worker, answered][true]
    for rows in _chunks(answers):
        task, worker, label = _tensors(answers, rows)
        counts.index_add_(0, worker * n_classes + label, posterior[task])
    return counts.view(answers.n_workers, n_classes, n_classes).transpose(1, 2)


def _errors(crowd: Tensor) -> Tensor:
    """(true, answered): how a crowd with these counts spreads its wrong answers, 0 on the diagonal; rows add to 1."""
    errors: Tensor = (crowd + 1 / len(crowd)) * (1 - torch.eye(len(crowd), dtype=crowd.dtype))
    return errors / errors.sum(1, keepdim=True)


def _shrunk(right: Tensor, n: Tensor) -> Tensor:
    """The share `right` / `n` (n_workers,) with two answers of the crowd's mean."""
    mean = (right.sum() + 1) / (n.sum() + 2)
    return (right + 2 * mean) / (n + 2)


def _chunks(answers: Answers) -> Iterator[slice]:
    return (slice(at, at + CHUNK) for at in range(0, len(answers), CHUNK))


def _tensors(answers: Answers, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    task, worker, label = (torch.from_numpy(part[rows]) for part in (answers.task, answers.worker, answers.label))
    return task, worker, label
