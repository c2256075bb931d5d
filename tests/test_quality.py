"""Figures of workers and labels, on crowds whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from crowdlayer.answers import Answers, majority_vote
from crowdlayer.learning import quality
from crowdlayer.learning.consensus import Consensus, consensus, count
from tests.crowds import Simulated, answers_of, simulate, start

KINDS = {
    "ten classes": {},
    "few answers": {"n_tasks": 300, "n_workers": 50},
    "one answer each": {"per_task": 1, "n_tasks": 1500},
    "three classes": {"n_classes": 3, "n_workers": 20, "per_task": 2, "signal": 1.5},
    "fifty classes": {"n_classes": 50, "n_workers": 50, "n_tasks": 2000, "per_task": 2, "signal": 3},
    "many workers": {"n_workers": 300, "per_task": 5},
    "poor classifier": {"signal": 1.5},
}


def true_quality(crowd: Simulated) -> Tensor:
    """Each worker's probability of a right answer, all classes being as frequent."""
    return torch.from_numpy(crowd.confusion.diagonal(axis1=1, axis2=2).mean(1))


# --- the workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_intervals_cover(kind: str) -> None:
    """Over ten crowds: near 95 % of the true reliabilities are inside, whatever the crowd is; and none is wide."""
    inside, width = [], []
    for seed in range(10):
        crowd = simulate(100 + seed, **KINDS[kind])  # type: ignore[arg-type]
        found = consensus(crowd.logits, start(crowd), crowd.answers)
        share, low, high = quality.reliability(found.posterior, crowd.answers)
        truth = true_quality(crowd)
        inside += ((low <= truth) & (truth <= high)).tolist()
        width += (high - low)[torch.bincount(torch.from_numpy(crowd.answers.worker), minlength=len(low)) >= 20].tolist()
        assert ((low <= share) & (share <= high)).all()
    assert np.mean(inside) >= 0.92
    assert np.max(width, initial=0) < 0.5


@pytest.mark.parametrize("rights", [0.9, 0.99, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("which", ["all right", "all wrong"])
def test_the_best_and_the_worst_have_narrow_intervals(rights: float, which: str) -> None:
    """Near certain that each of a hundred answers is right, or wrong, one knows the worker well."""
    believed = torch.tensor([[rights, 1 - rights]] * 100, dtype=torch.float64)
    believed = believed.flip(1) if which == "all wrong" else believed
    _, low, high = quality.reliability(believed, answers_of([(task, 0, 0) for task in range(100)], 100, 1))
    assert float((high - low)[0]) < (0.5 if rights == 0.9 else 0.1)


def test_with_the_truth_known_the_interval_is_wilsons() -> None:
    rows = [(task, 0, int(task >= 13)) for task in range(20)]
    certain = torch.eye(2, dtype=torch.float64)[torch.zeros(20, dtype=torch.long)]
    _, low, high = quality.reliability(certain, answers_of(rows, 20, 1))
    assert (float(low[0]), float(high[0])) == pytest.approx((0.432854, 0.818808), abs=1e-6)  # scipy's, for 13 of 20


def test_where_nothing_is_known_the_interval_says_so() -> None:
    rows = [(task, 0, 0) for task in range(50)]
    _, low, high = quality.reliability(torch.full((50, 2), 0.5, dtype=torch.float64), answers_of(rows, 50, 1))
    assert float(low[0]) < 0.01
    assert float(high[0]) > 0.99


@pytest.mark.parametrize("kind", ["ten classes", "one answer each", "three classes", "many workers"])
def test_the_spammers_are_found(kind: str) -> None:
    """Planted: of ten workers one answers at random, one always the same. The adversary is no spammer."""
    crowd = simulate(7, **KINDS[kind])  # type: ignore[arg-type]
    found = consensus(crowd.logits, start(crowd), crowd.answers)
    workers = quality.judge_workers(found, crowd.answers)
    n = len(crowd.confusion)
    planted = {worker for worker in range(n) if worker % 10 in (7, 8)}
    suspects = set(workers.spam.argsort(descending=True)[: len(planted)].tolist())
    assert len(suspects & planted) >= 0.9 * len(planted)
    worst = set(workers.order[: 3 * n // 10].tolist())
    assert len(worst & {worker for worker in range(n) if worker % 10 in (7, 8, 9)}) >= 0.9 * 3 * n // 10


def test_the_spammer_score_has_its_ends() -> None:
    eye, n = torch.eye(4, dtype=torch.float64), 4
    always, anything = eye[[2] * n], torch.full((n, n), 1 / n, dtype=torch.float64)
    swapped, fair = eye[[1, 2, 3, 0]], 0.5 * eye + 0.5 * anything
    scores = quality.spammer_score(torch.stack([always, anything, eye, swapped, fair]))
    assert scores.tolist() == pytest.approx([1, 1, 0, 0, 0.75])
    brute = 1 - sum(float((fair[a] - fair[b]).square().sum()) for a in range(n) for b in range(a)) / (n * (n - 1))
    assert float(scores[4]) == pytest.approx(brute)


def test_the_worst_class_is_the_one_least_often_recognised() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=600)  # class 3 is never seen
    label = np.where((truth == 1) & (rng.random(600) < 0.6), 0, truth)
    certain = torch.eye(4, dtype=torch.float64)[torch.from_numpy(truth)]
    answers = Answers(600, 1, np.arange(600), np.zeros(600, dtype=np.int64), label)
    assert quality.judge_workers(Consensus(certain, count(certain, answers)), answers).worst.tolist() == [1]


def test_a_worker_with_few_answers_is_neither_best_nor_worst() -> None:
    rows = [(task, 0, 0) for task in range(30)] + [(task, 1, int(task % 3 == 0)) for task in range(30)]
    rows += [(task, 2, 1) for task in range(30)] + [(0, 3, 1), (1, 4, 0)]
    certain = torch.eye(2, dtype=torch.float64)[torch.zeros(30, dtype=torch.long)]
    share, _, _ = quality.reliability(certain, answers_of(rows, 30, 5))
    assert share.argsort().tolist()[0] == 2
    assert share.argsort().tolist()[-1] == 0


def test_workers_who_are_as_good_come_in_the_order_of_their_names() -> None:
    """The same answers, summed in another order, differ in the last bit."""
    shares = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.2, 0.1], dtype=torch.float64)
    posterior = torch.stack([shares, 1 - shares], 1)
    for first, second in (((0, 1, 2), (3, 4, 5)), ((3, 4, 5), (0, 1, 2))):
        rows = [(task, worker, 0) for worker, tasks in enumerate((first, second)) for task in tasks]
        answers = answers_of(rows, 6, 2)
        found = quality.judge_workers(Consensus(posterior, count(posterior, answers)), answers)
        assert found.quality[0] != found.quality[1]
        assert found.order.tolist() == [0, 1]


# --- the labels ------------------------------------------------------------------------------------------------------


def planted(seed: int) -> tuple[Simulated, list[int]]:
    """A crowd of which every answer to 40 of 1000 tasks names one and the same wrong class; and those tasks."""
    crowd = simulate(seed, per_task=3, signal=4)
    rng = np.random.default_rng(seed)
    wrong = np.sort(rng.permutation(1000)[:40])
    label = crowd.answers.label.copy()
    for task in wrong:
        label[crowd.answers.task == task] = (crowd.truth[task] + 1 + rng.integers(9)) % 10
    answers = Answers(1000, 30, crowd.answers.task, crowd.answers.worker, label)
    return Simulated(crowd.truth, crowd.confusion, answers, crowd.logits), wrong.tolist()


def test_planted_wrong_labels_are_found() -> None:
    """Few tasks are called issues in vain, and the classifier, at 98 %, has to stand alone against three answers."""
    found = {}
    for seed in range(3):
        crowd, wrong = planted(seed)
        majority = torch.from_numpy(majority_vote(crowd.answers, 10))
        labels = quality.judge_labels(consensus(crowd.logits, start(crowd), crowd.answers).posterior, majority)
        mistaken = set(np.flatnonzero(majority.numpy() != crowd.truth).tolist())
        issues = set(torch.nonzero(labels.issue)[:, 0].tolist())
        first = set(labels.order[: len(mistaken)].tolist())
        found[seed] = (
            len(issues & set(wrong)) / len(wrong),
            len(issues & mistaken) / len(issues),
            len(first & mistaken) / len(mistaken),
        )
    planted_found, precision, ranked = np.mean(list(found.values()), axis=0)
    assert planted_found >= 0.7
    assert precision >= 0.95
    assert ranked >= 0.85


def test_the_first_rows_are_the_issues_then_the_doubtful() -> None:
    posterior = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]], dtype=torch.float64)
    labels = quality.judge_labels(posterior, torch.tensor([0, 0, 0, 0]))
    assert labels.issue.tolist() == [False, False, True, True]
    assert labels.order.tolist() == [3, 2, 1, 0]
    assert labels.label.tolist() == [0, 0, 1, 1]
    assert float(labels.entropy[0]) == pytest.approx(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)))
