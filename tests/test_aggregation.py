"""Dawid & Skene's EM on crowds whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crowdlayer.answers import Answers, majority_vote
from crowdlayer.learning.aggregation import RIGHT, SETTLED, STRENGTH, dawid_skene
from tests.crowds import Crowd, mixed_crowd


def answered(crowd: Crowd, truth: np.ndarray, per_task: int, rng: np.random.Generator) -> Answers:
    votes = crowd.answers(truth, per_task, rng)
    flat = [(i, int(worker), label) for i, vote in enumerate(votes) for worker, label in vote.items()]
    task, worker, label = np.array(flat).T
    return Answers(len(truth), len(crowd.confusion), task, worker, label)


def one_after_another(answers: Answers, n_classes: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """The EM with loops, in double precision."""
    n_answers = np.bincount(answers.task, minlength=answers.n_tasks)
    each = list(zip(answers.task, answers.worker, answers.label, strict=True))
    posterior = np.zeros((answers.n_tasks, n_classes))
    for i, _, y in each:
        posterior[i, y] += 1
    posterior /= posterior.sum(1, keepdims=True)
    prior = np.full((n_classes, n_classes), (1 - RIGHT) / (n_classes - 1))
    np.fill_diagonal(prior, RIGHT)
    for _ in range(rounds):
        confusion = np.stack([STRENGTH * prior] * answers.n_workers)
        for i, j, y in each:
            confusion[j, :, y] += posterior[i]
        confusion /= confusion.sum(2, keepdims=True)
        logs = np.tile(np.log((posterior.sum(0) + 1) / (answers.n_tasks + n_classes)), (answers.n_tasks, 1))
        for i, j, y in each:
            logs[i] += np.log(confusion[j, :, y])
        before, posterior = posterior, np.exp(logs - logs.max(1, keepdims=True))
        posterior /= posterior.sum(1, keepdims=True)
        for i, _, y in each:
            if n_answers[i] == 1 and posterior[i, y] < RIGHT:
                others = 1 - posterior[i, y]
                posterior[i, y] = 0
                posterior[i] *= (1 - RIGHT) / others
                posterior[i, y] = RIGHT
        if np.abs(posterior - before).sum(1).mean() < SETTLED:
            break
    return posterior, confusion


def test_it_is_the_em_written_with_loops() -> None:
    rng = np.random.default_rng(0)
    answers = answered(mixed_crowd(10, 4, rng), rng.integers(4, size=60), 3, rng)
    one = np.concatenate([np.flatnonzero(answers.task >= 20), np.arange(0, 60, 3)])  # of each of the first 20 tasks
    answers = Answers(60, 10, *(part[np.sort(one)] for part in (answers.task, answers.worker, answers.label)))
    posterior, confusion = one_after_another(answers, 4, 100)
    got = dawid_skene(answers, 4)
    np.testing.assert_allclose(got.posterior, posterior, atol=1e-4)
    np.testing.assert_allclose(got.confusion, confusion, atol=1e-4)


def test_it_is_better_than_majority_vote_on_a_mixed_crowd() -> None:
    rng = np.random.default_rng(1)
    crowd, truth = mixed_crowd(20, 5, rng), rng.integers(5, size=2000)
    answers = answered(crowd, truth, 5, rng)
    found = dawid_skene(answers, 5)
    right = (found.posterior.argmax(1).numpy() == truth).mean()
    assert right > (majority_vote(answers, 5) == truth).mean() + 0.01
    assert np.abs(found.confusion.numpy() - crowd.confusion).mean() < 0.03


UNLIKE = [[0.1] * 10, [0.65, 0.35], [0.95, 0.05], [0.7, 0.2, 0.1], [0.7] + [0.3 / 9] * 9]
"""Shares of classes."""


@pytest.mark.parametrize("shares", UNLIKE)
@pytest.mark.parametrize("right", [0.4, 0.6, 0.9])
def test_with_one_answer_per_task_the_label_is_the_answer(right: float, shares: list[float]) -> None:
    rng, k = np.random.default_rng(2), len(shares)
    truth = rng.choice(k, 3000, p=shares)
    worker = rng.integers(40, size=3000)
    label = np.where(rng.random(3000) < right, truth, rng.integers(k, size=3000))
    answers = Answers(3000, 40, np.arange(3000), worker, label)
    found = dawid_skene(answers, k)
    assert (found.posterior.argmax(1).numpy() == label).all()
    torch.testing.assert_close(found.posterior.sum(1), torch.ones(3000))


@pytest.mark.parametrize("shares", UNLIKE[1:])
def test_few_answers_do_not_make_rarer_classes_errors_about_the_frequent_one(shares: list[float]) -> None:
    """Most tasks have one answer, some two."""
    rng, k = np.random.default_rng(3), len(shares)
    truth = rng.choice(k, 2000, p=shares)
    crowd = Crowd(np.stack([right * np.eye(k) + (1 - right) / k for right in rng.uniform(0.5, 0.98, 40)]))
    one, two = (answered(crowd, part, n, rng) for part, n in ((truth[:1400], 1), (truth[1400:], 2)))
    parts = (one.task, two.task + 1400), (one.worker, two.worker), (one.label, two.label)
    both = Answers(2000, 40, *map(np.concatenate, parts))
    label, vote, rare = dawid_skene(both, k).posterior.argmax(1).numpy(), majority_vote(both, k), truth != 0
    assert (label == truth).mean() > (vote == truth).mean()
    assert (label == truth)[rare].mean() > (vote == truth)[rare].mean() - 0.1


def test_a_task_without_answers_gets_the_shares_of_the_classes_and_a_silent_worker_the_prior() -> None:
    answers = Answers(4, 2, np.array([0, 1, 3]), np.array([0, 0, 0]), np.array([1, 1, 0]))
    found = dawid_skene(answers, 2)
    assert found.posterior.isfinite().all()
    assert found.posterior[2, 1] > 0.5
    torch.testing.assert_close(found.confusion[1], torch.tensor([[RIGHT, 1 - RIGHT], [1 - RIGHT, RIGHT]]))
