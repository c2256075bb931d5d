"""What classifier and answers say together: the true classes, and how each worker answers. Pure functions.

They rest on the classifier's logits and on the log-likelihood of answers, log P(answered | true
class, worker), whatever worker model it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..answers import Answers
from .aggregation import RIGHT

PRIOR = 10.0
"""So many answers per true class weighs what is believed of a worker before its answers to that class are seen."""
ROUNDS = 5
"""Rounds of `consensus`: on simulated crowds its figures hardly move after three, from a poor start after five."""
LEAST = -30.0
"""The least log-probability of an answer: nobody is quite sure to give none like it."""
SEVERAL = 0.1
"""Below this share of tasks with several answers the worker model is no start for the rounds.

On simulated crowds of 3, 10 and 100 classes it is the better one where half of the tasks have several, and far the
worse one where none has.
"""
CELLS = 2**21
"""Numbers handled at once: what is held beside the results is a few times as many float64."""
ANSWERS_TO_FIT = 100_000
"""So many answers are enough to fit a temperature."""
ALIKE = 1e-6
"""Criteria that differ by less, relatively, are the same."""
FACTORS = tuple(2 ** (step / 2) for step in range(18))
"""The temperatures tried, in units of the least one, which may be 0.05: 1, 1.4, 2 … 362; between two little changes."""

Evidence = Callable[[slice], Tensor]
"""For a slice of the answers, log P(answer | true class), (answers, classes)."""


@dataclass(frozen=True)
class Counts:
    """Each worker's answers, shared out over the true classes by a posterior, and what they show of the worker.

    A row for each (worker, label) that occurs, sorted, so memory grows with the answers: matrices of a large crowd are
    gigabytes. `worker` and `label` (rows,) say which; `true` (rows, classes) float64, how often that worker gave that
    label where each class is true.
    """

    n_workers: int
    worker: Tensor
    label: Tensor
    true: Tensor

    @property
    def n_classes(self) -> int:
        return self.true.shape[1]

    @cached_property
    def seen(self) -> Tensor:
        """(n_workers, true): each worker's answers by true class."""
        return self.true.new_zeros(self.n_workers, self.n_classes).index_add_(0, self.worker, self.true)

    @cached_property
    def answered(self) -> Tensor:
        """(n_workers, answered): each worker's answers by label."""
        given = self.true.new_zeros(self.n_workers, self.n_classes)
        return given.index_put_((self.worker, self.label), self.true.sum(1))

    @cached_property
    def given(self) -> Tensor:
        """(n_workers,): how many answers each gave."""
        return self.seen.sum(1)

    @cached_property
    def right(self) -> Tensor:
        """(n_workers,): how many of them are right."""
        right = self.true.gather(1, self.label[:, None])[:, 0]
        return self.true.new_zeros(self.n_workers).index_add_(0, self.worker, right)

    @cached_property
    def crowds_mean(self) -> float:
        """The share of all answers that is right."""
        return mean_share(self.right, self.given)

    @cached_property
    def errors(self) -> Tensor:
        """(true, answered): how the crowd spreads its wrong answers, 0 on the diagonal; rows add to 1."""
        eye = torch.eye(self.n_classes, dtype=self.true.dtype)
        crowd = torch.zeros_like(eye).index_add_(0, self.label, self.true).T
        errors: Tensor = (crowd + 1 / self.n_classes) * (1 - eye)
        return errors / errors.sum(1, keepdim=True)

    def of(self, worker: Tensor, label: Tensor) -> Tensor:
        """(n, true): how often the workers (n,) gave the labels (n,)."""
        known, wanted = self.worker * self.n_classes + self.label, worker * self.n_classes + label
        row = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
        return torch.where((known[row] == wanted)[:, None], self.true[row], 0.0)

    def expected(self, worker: Tensor, label: Tensor, own: Tensor | None = None) -> Tensor:
        """(n, true): P(label | true) if the workers were as good at every class, and erred as the crowd does.

        How good they are is said by all answers of theirs but `own`, (n, true) one of each, shared out.
        """
        right, given = self.right[worker], self.given[worker]
        if own is not None:
            right, given = right - own.gather(1, label[:, None])[:, 0], given - own.sum(1)
        share = shrunk(right, given, self.crowds_mean)[:, None]
        return ((1 - share) * self.errors.T[label]).scatter(1, label[:, None], share)

    def likelihood(self, worker: Tensor, label: Tensor) -> Tensor:
        """(n, true): P(label | true, worker), from the counts and `expected`, which weighs PRIOR answers.

        A class that a worker has hardly seen is thus judged by how it does elsewhere.
        """
        shown = self.of(worker, label).add_(self.expected(worker, label), alpha=PRIOR)
        return shown.div_(self.seen[worker] + PRIOR)

    def blocks(self, workers: Tensor) -> tuple[Tensor, ...]:
        """The workers (n,), as many at a time as have CELLS numbers in their matrices."""
        return torch.split(workers, max(1, CELLS // self.n_classes**2))

    def table(self, workers: Tensor) -> Tensor:
        """(n, true, answered): the counts of the workers (n,)."""
        return self._whole(self.of, workers)

    def confusion(self, workers: Tensor) -> Tensor:
        """(n, true, answered): P(answered | true, worker) for the workers (n,)."""
        return self._whole(self.likelihood, workers)

    def _whole(self, part: Callable[[Tensor, Tensor], Tensor], workers: Tensor) -> Tensor:
        n = self.n_classes
        return part(workers.repeat_interleave(n), torch.arange(n).repeat(len(workers))).view(-1, n, n).transpose(1, 2)


@dataclass(frozen=True)
class Consensus:
    """What classifier and answers say together.

    `posterior` (tasks, classes) is P(true class | image, answers), float64; `counts`, each worker's answers, shared out
    by it.
    """

    posterior: Tensor
    counts: Counts


def consensus(logits: Tensor, log_likelihood: Tensor, answers: Answers, rounds: int = ROUNDS) -> Consensus:
    """Labels and workers' matrices that fit each other, started from a worker model's likelihood.

    Bayes' rule with the classifier as the prior gives a posterior, its counts give the workers' matrices, these a
    better posterior, and so on (Dawid & Skene 1979, with images). A task is judged by matrices from which its own
    answers are taken out (the collapsed variational Bayes of Asuncion et al. 2009): else an answer would testify to
    its own worth, and certainty would grow out of nothing.

    Args:
        logits: (tasks, classes), divided by their temperature.
        log_likelihood: log P(answered | true, worker), (n_workers, true, answered). Where it is poor, as that of
            a layer still near its start, the rounds mend it.
        answers: to these tasks.
    """
    prior = logits.double().log_softmax(1)
    posterior = _bayes(prior, _at_first(log_likelihood, answers), answers).softmax(1)
    for _ in range(rounds):
        posterior = _bayes(prior, _as_others_show(posterior, answers), answers).softmax(1)
    return Consensus(posterior, count(posterior, answers))


def count(posterior: Tensor, answers: Answers) -> Counts:
    """The answers, shared out over the true classes by the posterior (tasks, classes)."""
    n_classes = posterior.shape[1]
    worker, label, at = map(torch.from_numpy, answers.pairs)
    true = posterior.new_zeros(len(worker), n_classes)
    for rows in _chunks(answers, n_classes):
        true.index_add_(0, at[rows], posterior[torch.from_numpy(answers.task[rows])])
    return Counts(answers.n_workers, worker, label, true)


def answers_log_loss(logits: Tensor, counts: Counts, answers: Answers) -> float:
    """-log P(answers | images) per task, in nats: the loss of a classifier where only answers are known.

    `counts`: what other answers show of the workers.
    """
    scores = _bayes(logits.double().log_softmax(1), _as_counted(counts, answers), answers)
    return -float(scores.logsumexp(1).mean())


def predictive_temperature(logits: Tensor, log_likelihood: Tensor, answers: Answers, least: float) -> float:
    """The temperature, `least` or more, with which the classifier best predicts each answer beside the others.

    The criterion, the mean of log P(answer | image, the task's other answers), needs no true label. Of the images that
    a classifier was trained on it is too sure, and it predicts their answers, which it has learnt, too well for the
    criterion to see all of that: the posterior is an upper bound. Where no task has two answers `least` comes out.
    """
    given = np.diff(answers.starts_at)
    chosen = np.flatnonzero(given > 1)
    share = ANSWERS_TO_FIT / max(int(given[chosen].sum()), 1)
    if share < 1:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[: round(share * len(chosen))])
    if len(chosen) == 0:
        return least
    rows, sample = torch.from_numpy(chosen), answers.of_tasks(chosen)
    best, found, worse = -math.inf, least, 0
    for temperature in (least * factor for factor in FACTORS):
        rated = _predicts(logits[rows] / temperature, log_likelihood, sample)
        if rated > best + ALIKE * abs(rated):
            best, found, worse = rated, temperature, 0
        elif rated < best - ALIKE * abs(best):  # where a classifier is sure of everything they are alike for a while
            worse += 1
        if worse == 2:  # it has one peak
            break
    return found


def mean_share(right: Tensor, n: Tensor) -> float:
    """The share of right answers of a crowd whose workers have `right` of `n` each, (n_workers,)."""
    return float((right.sum() + 1) / (n.sum() + 2))


def shrunk(right: Tensor, n: Tensor, mean: float) -> Tensor:
    """The shares `right` / `n` with two answers of the crowd's mean."""
    return (right + 2 * mean) / (n + 2)


def _predicts(logits: Tensor, log_likelihood: Tensor, answers: Answers) -> float:
    """The sum over the answers of log P(answer | image, the task's other answers)."""
    found = consensus(logits, log_likelihood, answers)
    evidence = _as_others_show(found.posterior, answers)
    scores = _bayes(logits.double().log_softmax(1), evidence, answers)
    total = 0.0
    for rows in _chunks(answers, logits.shape[1]):
        ours = evidence(rows)
        without = (scores[torch.from_numpy(answers.task[rows])] - ours).log_softmax(1)
        total += float((without + ours).logsumexp(1).sum())
    return total


def _bayes(log_prior: Tensor, evidence: Evidence, answers: Answers) -> Tensor:
    """(tasks, classes): log P(true class, answers | image)."""
    scores = log_prior.clone()
    for rows in _chunks(answers, scores.shape[1]):
        scores.index_add_(0, torch.from_numpy(answers.task[rows]), evidence(rows))
    return scores


def _at_first(log_likelihood: Tensor, answers: Answers) -> Evidence:
    """The answers under the worker model's matrices; or, where hardly any task has several, as the prior has them.

    Nothing but the classifier bears out a single answer, so where it says little, the rounds come to what they started
    from; and with many classes a layer near the identity holds hardly any answer to be right.
    """
    several = np.diff(answers.starts_at) > 1

    def modelled(rows: slice) -> Tensor:
        _, worker, label = tensors(answers, rows)
        return log_likelihood[worker, :, label].double().clamp_min(LEAST)

    def assumed(rows: slice) -> Tensor:
        _, _, label = tensors(answers, rows)
        n_classes = log_likelihood.shape[2]
        evidence = torch.full((len(label), n_classes), math.log((1 - RIGHT) / (n_classes - 1)), dtype=torch.float64)
        return evidence.scatter_(1, label[:, None], math.log(RIGHT))

    return modelled if several.mean() >= SEVERAL else assumed


def _as_counted(counts: Counts, answers: Answers) -> Evidence:
    """The answers under the matrices that other answers show."""

    def evidence(rows: slice) -> Tensor:
        _, worker, label = tensors(answers, rows)
        return counts.likelihood(worker, label).log_()

    return evidence


def _as_others_show(posterior: Tensor, answers: Answers) -> Evidence:
    """The answers under the matrices that each worker's answers to other tasks show."""
    counts = count(posterior, answers)
    at = torch.from_numpy(answers.pairs[2])

    def evidence(rows: slice) -> Tensor:
        task, worker, label = tensors(answers, rows)
        own = posterior[task]
        alike = (counts.true[at[rows]] - own).clamp_min(0) + PRIOR * counts.expected(worker, label, own)
        return (alike / ((counts.seen[worker] - own).clamp_min(0) + PRIOR)).log()

    return evidence


def _chunks(answers: Answers, n_classes: int) -> Iterator[slice]:
    n = max(1, CELLS // n_classes)
    return (slice(at, at + n) for at in range(0, len(answers), n))


def tensors(answers: Answers, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """(answers,) each: task, worker and label of a slice of the answers."""
    task, worker, label = (torch.from_numpy(part[rows]) for part in (answers.task, answers.worker, answers.label))
    return task, worker, label
