"""Figures of workers and labels, on crowds whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from crowdlayer.answers import Answers, majority_vote
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.learning import quality
from crowdlayer.learning.inference import Predictions, infer
from crowdlayer.learning.metrics import cross_entropy
from crowdlayer.learning.quality import consensus
from tests.crowds import Simulated, simulate

KINDS = {
    "ten classes": {},
    "few answers": {"n_tasks": 300, "n_workers": 50},
    "one answer each": {"per_task": 1, "n_tasks": 1500},
    "three classes": {"n_classes": 3, "n_workers": 20, "per_task": 2, "signal": 1.5},
    "fifty classes": {"n_classes": 50, "n_workers": 50, "n_tasks": 2000, "per_task": 2, "signal": 3},
    "many workers": {"n_workers": 300, "per_task": 5},
    "poor classifier": {"signal": 1.5},
}


def start(crowd: Simulated, certainty: float = 1.0) -> Tensor:
    """The likelihood of a layer that is near its start, the identity."""
    n_workers, n_classes, _ = crowd.confusion.shape
    return (certainty * torch.eye(n_classes, dtype=torch.float64)).repeat(n_workers, 1, 1).log_softmax(2)


def true_quality(crowd: Simulated) -> Tensor:
    """Each worker's probability of a right answer, all classes being as frequent."""
    return torch.from_numpy(crowd.confusion.diagonal(axis1=1, axis2=2).mean(1))


def right(posterior: Tensor, crowd: Simulated) -> float:
    return float((posterior.argmax(1).numpy() == crowd.truth).mean())


def answers_of(rows: list[tuple[int, int, int]], n_tasks: int, n_workers: int) -> Answers:
    task, worker, label = np.array(sorted(rows)).T.copy()
    return Answers(n_tasks, n_workers, task, worker, label)


# --- the consensus ---------------------------------------------------------------------------------------------------


def test_without_rounds_the_consensus_is_bayes_rule() -> None:
    rng = np.random.default_rng(1)
    logits, likelihood = torch.from_numpy(rng.normal(size=(3, 4))), torch.from_numpy(rng.normal(size=(2, 4, 4)))
    rows = [(0, 0, 1), (0, 1, 2), (2, 1, 3)]
    expected = logits.exp()
    for task, worker, label in rows:
        expected[task] *= likelihood.log_softmax(2)[worker, :, label].exp()
    found = consensus(logits, likelihood.log_softmax(2), answers_of(rows, 3, 2), rounds=0)
    torch.testing.assert_close(found.posterior, expected / expected.sum(1, keepdim=True))


def test_the_consensus_is_what_its_formula_says() -> None:
    """Two rounds against loops over tasks, answers and classes."""
    crowd = simulate(0, n_classes=3, n_tasks=12, n_workers=10, per_task=2, signal=1)
    likelihood = torch.from_numpy(np.random.default_rng(0).standard_normal((10, 3, 3))).log_softmax(2)
    prior = crowd.logits.softmax(1).numpy()
    given = list(zip(crowd.answers.task, crowd.answers.worker, crowd.answers.label, strict=True))

    posterior = prior.copy()
    for task, worker, label in given:
        posterior[task] *= likelihood[worker, :, label].exp().numpy()
    posterior /= posterior.sum(1, keepdims=True)
    for _ in range(2):
        counts = np.zeros((10, 3, 3))
        for task, worker, label in given:
            counts[worker, :, label] += posterior[task]
        n_right, n = counts.trace(axis1=1, axis2=2), counts.sum((1, 2))
        reliable = (n_right + 2 * (n_right.sum() + 1) / (n.sum() + 2)) / (n + 2)
        errors = (counts.sum(0) + 1 / 3) * (1 - np.eye(3))
        errors /= errors.sum(1, keepdims=True)
        fresh = prior.copy()
        for task, worker, label in given:
            for true in range(3):
                others = counts[worker, true].copy()
                others[label] -= posterior[task, true]
                before = reliable[worker] if true == label else (1 - reliable[worker]) * errors[true, label]
                fresh[task, true] *= (others[label] + quality.PRIOR * before) / (others.sum() + quality.PRIOR)
        posterior = fresh / fresh.sum(1, keepdims=True)

    found = consensus(crowd.logits, likelihood, crowd.answers, rounds=2)

    np.testing.assert_allclose(found.posterior.numpy(), posterior, rtol=1e-9)


def test_the_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = simulate(1, n_tasks=100)
    whole = consensus(crowd.logits, start(crowd), crowd.answers)
    monkeypatch.setattr(quality, "CHUNK", 7)
    parts = consensus(crowd.logits, start(crowd), crowd.answers)
    torch.testing.assert_close(whole.posterior, parts.posterior)
    torch.testing.assert_close(whole.counts, parts.counts)


def test_every_answer_is_counted_once_and_a_row_is_a_distribution() -> None:
    crowd = simulate(2)
    found = consensus(crowd.logits, start(crowd), crowd.answers)
    given = torch.bincount(torch.from_numpy(crowd.answers.worker), minlength=30).double()
    torch.testing.assert_close(found.counts.sum((1, 2)), given)
    for matrices in (quality.confusion(found.counts), quality.expected(found.counts)):
        assert (matrices > 0).all()
        torch.testing.assert_close(matrices.sum(2), torch.ones(30, 10, dtype=torch.float64))


def test_an_answer_that_a_model_holds_impossible_is_only_unlikely() -> None:
    crowd = simulate(2, n_tasks=200)
    impossible = torch.eye(10, dtype=torch.float64).repeat(30, 1, 1).log()
    found = consensus(crowd.logits, impossible, crowd.answers)
    assert found.posterior.isfinite().all()
    assert right(found.posterior, crowd) > 0.9


@pytest.mark.parametrize("certainty", [0.0, 1.0, 4.0])
def test_a_layer_near_its_start_is_mended(certainty: float) -> None:
    """Even one whose likelihood says nothing; and the workers' matrices come out near the true ones."""
    crowd = simulate(3)
    found = consensus(crowd.logits, start(crowd, certainty), crowd.answers)
    majority = (majority_vote(crowd.answers, 10) == crowd.truth).mean()
    assert right(found.posterior, crowd) > 0.95 > max(majority, right(crowd.logits, crowd)) + 0.1
    assert np.abs(quality.confusion(found.counts).numpy() - crowd.confusion).mean() < 0.05


def test_the_posterior_can_be_believed() -> None:
    """Of the labels given with a certainty of 90 % and more, no less than that are right; and so on downwards."""
    crowd = simulate(4, n_tasks=3000, per_task=2, signal=1.5)
    score, label = consensus(crowd.logits, start(crowd), crowd.answers).posterior.max(1)
    hit = label.numpy() == crowd.truth
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 0.9), (0.9, 1.01)):
        rows = ((score >= low) & (score < high)).numpy()
        assert hit[rows].mean() == pytest.approx(float(score[rows].mean()), abs=0.1)


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
    counts = quality.Consensus(certain, torch.zeros(1)).posterior.new_zeros(1, 4, 4)
    for true, observed in zip(truth, label, strict=True):
        counts[0, true, observed] += 1
    assert quality.judge_workers(quality.Consensus(certain, counts), answers).worst.tolist() == [1]


def test_a_worker_with_few_answers_is_neither_best_nor_worst() -> None:
    rows = [(task, 0, 0) for task in range(30)] + [(task, 1, int(task % 3 == 0)) for task in range(30)]
    rows += [(task, 2, 1) for task in range(30)] + [(0, 3, 1), (1, 4, 0)]
    certain = torch.eye(2, dtype=torch.float64)[torch.zeros(30, dtype=torch.long)]
    share, _, _ = quality.reliability(certain, answers_of(rows, 30, 5))
    assert share.argsort().tolist()[0] == 2
    assert share.argsort().tolist()[-1] == 0


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


# --- the temperature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overconfidence", "least"), [(1.0, 1.0), (4.0, 1.0), (4.0, 0.05)])
def test_the_answers_tell_how_far_to_believe_the_classifier(overconfidence: float, least: float) -> None:
    crowd = simulate(5, overconfidence=overconfidence)
    found = quality.predictive_temperature(crowd.logits, start(crowd), crowd.answers, least)
    assert overconfidence / 1.5 <= found <= overconfidence * 2


def test_a_classifier_that_has_seen_the_answers_is_believed_less() -> None:
    """As one that was trained on them, whose logits lean towards what was answered."""
    crowd = simulate(6, per_task=5)
    seen, truth = crowd.logits.clone(), torch.from_numpy(crowd.truth)
    task, label = torch.from_numpy(crowd.answers.task), torch.from_numpy(crowd.answers.label)
    seen.index_put_((task, label), torch.tensor(4.0, dtype=torch.float64), accumulate=True)
    temperature = quality.predictive_temperature(seen, start(crowd), crowd.answers, 1.0)
    assert temperature > 1
    believed, doubted = (
        cross_entropy(consensus(seen / t, start(crowd), crowd.answers).posterior.log(), truth)
        for t in (1.0, temperature)
    )
    assert doubted < believed


def test_of_single_answers_nothing_can_be_told() -> None:
    crowd = simulate(8, per_task=1, overconfidence=4)
    assert quality.predictive_temperature(crowd.logits, start(crowd), crowd.answers, 1.7) == 1.7


@pytest.mark.parametrize("with_val", [True, False])
def test_ten_images_without_an_error_leave_a_calibrated_classifier_about_as_it_is(with_val: bool) -> None:
    """The likeliest temperature of both kinds is none at all, below which every wrong image is wrong for certain."""
    crowd = simulate(11, n_tasks=310, signal=4)
    names, task = [str(task) for task in range(310)], np.arange(310)
    whole = CrowdImages(names, names, crowd.answers, crowd.truth)
    train, held = whole.subset(task[:300]), whole.subset(task[300:])
    val = LabelledImages(held.names, held.truth) if with_val else None
    dataset = Dataset("made up", names[:10], names[:30], train, None if with_val else held, val, None)
    temperature, _ = infer(dataset, Predictions(crowd.logits[:300], crowd.logits[300:], None), start(crowd))
    assert 0.4 < temperature < 1.5


def test_a_sample_of_the_answers_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = simulate(9, n_tasks=2000, overconfidence=4)
    whole = quality.predictive_temperature(crowd.logits, start(crowd), crowd.answers, 1.0)
    monkeypatch.setattr(quality, "ANSWERS_TO_FIT", 2000)
    sampled = quality.predictive_temperature(crowd.logits, start(crowd), crowd.answers, 1.0)
    assert whole / 2 <= sampled <= 2 * whole
