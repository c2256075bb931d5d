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
        if np.abs(posterior - before).sum(1).mean() < SETTLED:
            break
    return posterior, confusion


def test_it_is_the_em_written_with_loops() -> None:
    rng = np.random.default_rng(0)
    answers = answered(mixed_crowd(10, 4, rng), rng.integers(4, size=60), 3, rng)
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


@pytest.mark.parametrize("right", [0.4, 0.6, 0.9])
def test_with_one_answer_per_task_the_label_is_the_answer(right: float) -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(10, size=3000)
    worker = rng.integers(300, size=3000)
    label = np.where(rng.random(3000) < right, truth, rng.integers(10, size=3000))
    answers = Answers(3000, 300, np.arange(3000), worker, label)
    assert (dawid_skene(answers, 10).posterior.argmax(1).numpy() == label).mean() > 0.99


def test_a_task_without_answers_gets_the_shares_of_the_classes_and_a_silent_worker_the_prior() -> None:
    answers = Answers(4, 2, np.array([0, 1, 3]), np.array([0, 0, 0]), np.array([1, 1, 0]))
    found = dawid_skene(answers, 2)
    assert found.posterior.isfinite().all()
    assert found.posterior[2, 1] > 0.5
    torch.testing.assert_close(found.confusion[1], torch.tensor([[RIGHT, 1 - RIGHT], [1 - RIGHT, RIGHT]]))
