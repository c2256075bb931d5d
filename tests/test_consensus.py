"""What classifier and answers say together, on crowds whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from crowdlayer.answers import Answers, majority_vote
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.learning import consensus as module
from crowdlayer.learning import selection
from crowdlayer.learning.consensus import PRIOR, answers_log_loss, consensus, count, predictive_temperature
from crowdlayer.learning.crowd_layer import WORKER_MODELS, WorkerModel
from crowdlayer.learning.inference import Predictions, infer
from crowdlayer.learning.metrics import cross_entropy
from tests.crowds import Simulated, answers_of, simulate, start

Floats = npt.NDArray[np.float64]


def right(posterior: Tensor, crowd: Simulated) -> float:
    return float((posterior.argmax(1).numpy() == crowd.truth).mean())


def counted(posterior: Floats, answers: Answers) -> Floats:
    """(n_workers, true, answered): the answers, shared out by the posterior, in a loop."""
    counts = np.zeros((answers.n_workers, posterior.shape[1], posterior.shape[1]))
    for task, worker, label in zip(answers.task, answers.worker, answers.label, strict=True):
        counts[worker, :, label] += posterior[task]
    return counts


def expected(counts: Floats, own: float = 0, n_own: int = 0) -> Floats:
    """(n_workers, true, answered): workers who are as good at every class, and err as the crowd does.

    How good they are is said without `n_own` answers, of which `own` are right.
    """
    n_classes = counts.shape[1]
    right, n = counts.trace(axis1=1, axis2=2), counts.sum((1, 2))
    reliable = (right - own + 2 * (right.sum() + 1) / (n.sum() + 2)) / (n - n_own + 2)
    errors = (counts.sum(0) + 1 / n_classes) * (1 - np.eye(n_classes))
    errors /= errors.sum(1, keepdims=True)
    found: Floats = reliable[:, None, None] * np.eye(n_classes) + (1 - reliable)[:, None, None] * errors
    return found


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
        counts = counted(posterior, crowd.answers)
        fresh = prior.copy()
        for task, worker, label in given:
            before = PRIOR * expected(counts, posterior[task, label], 1)
            for true in range(3):
                others = counts[worker, true].copy()
                others[label] -= posterior[task, true]
                fresh[task, true] *= (others[label] + before[worker, true, label]) / (others.sum() + PRIOR)
        posterior = fresh / fresh.sum(1, keepdims=True)

    found = consensus(crowd.logits, likelihood, crowd.answers, rounds=2)

    np.testing.assert_allclose(found.posterior.numpy(), posterior, rtol=1e-9)


def test_what_answers_show_of_the_workers_is_what_the_formulas_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whole matrices, in any order and a block at a time, of workers with and without answers."""
    crowd = simulate(3, n_classes=4, n_tasks=15, n_workers=20, per_task=2, signal=1)
    posterior = crowd.logits.softmax(1)
    dense = counted(posterior.numpy(), crowd.answers)
    assert 0 < (dense.sum((1, 2)) == 0).sum() < 20
    confusion = (dense + PRIOR * expected(dense)) / (dense.sum(2, keepdims=True) + PRIOR)
    monkeypatch.setattr(module, "CELLS", 50)
    order = torch.from_numpy(np.random.default_rng(0).permutation(20))

    counts = count(posterior, crowd.answers)
    blocks = counts.blocks(order)

    assert len(blocks) == 7
    for table, formula in ((counts.table, dense), (counts.confusion, confusion)):
        np.testing.assert_allclose(torch.cat([table(some) for some in blocks]).numpy(), formula[order], atol=1e-12)
    np.testing.assert_allclose(counts.seen.numpy(), dense.sum(2), atol=1e-12)
    np.testing.assert_allclose(counts.answered.numpy(), dense.sum(1), atol=1e-12)
    np.testing.assert_allclose(confusion.sum(2), 1)


def test_the_loss_by_answers_is_that_under_what_other_answers_show() -> None:
    """Some of its workers gave no such label to the others, some none at all."""
    crowd, others = (
        simulate(4, n_classes=4, n_tasks=15, n_workers=20),
        simulate(5, n_classes=4, n_tasks=15, n_workers=9),
    )
    counts = count(others.logits.softmax(1), replace(others.answers, n_workers=20))
    shown = counts.confusion(torch.arange(20)).numpy()
    scores = crowd.logits.softmax(1).numpy()
    for task, worker, label in zip(crowd.answers.task, crowd.answers.worker, crowd.answers.label, strict=True):
        scores[task] *= shown[worker, :, label]
    assert answers_log_loss(crowd.logits, counts, crowd.answers) == pytest.approx(-np.log(scores.sum(1)).mean())


@torch.no_grad()
@pytest.mark.parametrize("model", ["matrix", "stochastic"])
def test_the_loss_of_held_out_answers_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """A matrix for each answer at once would grow with the data set."""
    crowd = simulate(1, n_tasks=40, n_classes=4)
    layer = WORKER_MODELS[model](30, 4)
    layer.start_at(torch.rand(30, 4, 4).softmax(2))
    logits = crowd.logits.float()
    whole = selection.by_answers(logits, crowd.answers, layer, "calibrated_loss")
    task, worker, label = (torch.from_numpy(x) for x in (crowd.answers.task, crowd.answers.worker, crowd.answers.label))
    formula = torch.nn.functional.cross_entropy(layer(logits, task, worker), label, reduction="sum") / 40
    assert whole[0] == pytest.approx(float(formula))
    monkeypatch.setattr(selection, "CELLS", 16 * 7)
    gathered: list[int] = []

    def rows(self: WorkerModel, table: Tensor, of: Tensor) -> Tensor:
        gathered.append(len(of))
        return table[of]

    monkeypatch.setattr(WorkerModel, "rows", rows)
    assert selection.by_answers(logits, crowd.answers, layer, "calibrated_loss") == pytest.approx(whole)
    assert max(gathered) == 7


def test_the_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = simulate(1, n_tasks=100)
    whole = consensus(crowd.logits, start(crowd), crowd.answers)
    monkeypatch.setattr(module, "CELLS", 70)
    parts = consensus(crowd.logits, start(crowd), crowd.answers)
    torch.testing.assert_close(whole.posterior, parts.posterior)
    torch.testing.assert_close(whole.counts.true, parts.counts.true)


def test_every_answer_is_counted_once() -> None:
    crowd = simulate(2)
    found = consensus(crowd.logits, start(crowd), crowd.answers)
    given = torch.bincount(torch.from_numpy(crowd.answers.worker), minlength=30).double()
    torch.testing.assert_close(found.counts.table(torch.arange(30)).sum((1, 2)), given)


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
    assert np.abs(found.counts.confusion(torch.arange(30)).numpy() - crowd.confusion).mean() < 0.05


def test_the_posterior_can_be_believed() -> None:
    """Of the labels given with a certainty of 90 % and more, no less than that are right; and so on downwards."""
    crowd = simulate(4, n_tasks=3000, per_task=2, signal=1.5)
    score, label = consensus(crowd.logits, start(crowd), crowd.answers).posterior.max(1)
    hit = label.numpy() == crowd.truth
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 0.9), (0.9, 1.01)):
        rows = ((score >= low) & (score < high)).numpy()
        assert hit[rows].mean() == pytest.approx(float(score[rows].mean()), abs=0.1)


# --- the temperature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overconfidence", "least"), [(1.0, 1.0), (4.0, 1.0), (4.0, 0.05)])
def test_the_answers_tell_how_far_to_believe_the_classifier(overconfidence: float, least: float) -> None:
    crowd = simulate(5, overconfidence=overconfidence)
    found = predictive_temperature(crowd.logits, start(crowd), crowd.answers, least)
    assert overconfidence / 1.5 <= found <= overconfidence * 2


def test_a_classifier_that_has_seen_the_answers_is_believed_less() -> None:
    """As one that was trained on them, whose logits lean towards what was answered."""
    crowd = simulate(6, per_task=5)
    seen, truth = crowd.logits.clone(), torch.from_numpy(crowd.truth)
    task, label = torch.from_numpy(crowd.answers.task), torch.from_numpy(crowd.answers.label)
    seen.index_put_((task, label), torch.tensor(4.0, dtype=torch.float64), accumulate=True)
    temperature = predictive_temperature(seen, start(crowd), crowd.answers, 1.0)
    assert temperature > 1
    believed, doubted = (
        cross_entropy(consensus(seen / t, start(crowd), crowd.answers).posterior.log(), truth)
        for t in (1.0, temperature)
    )
    assert doubted < believed


def test_a_classifier_that_has_exploded_does_not_overrule_the_crowd() -> None:
    """It is as sure of its one class at half the logits, and at a quarter: neither temperature is the better one."""
    crowd = simulate(7, n_classes=3, n_tasks=300, n_workers=8, per_task=2)
    logits = 1e-2 * torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0, 0.0])
    for scale in (100.0, 300.0):
        temperature = predictive_temperature(scale * logits, start(crowd), crowd.answers, 1.0)
        label = consensus(scale * logits / temperature, start(crowd), crowd.answers).posterior.argmax(1).numpy()
        voted = majority_vote(crowd.answers, 3)
        assert (label == crowd.truth).mean() > (voted == crowd.truth).mean() - 0.02


@pytest.mark.parametrize("n_classes", [10, 100])
def test_single_answers_that_nothing_speaks_against_are_taken_for_mostly_right(n_classes: int) -> None:
    """A layer near the identity, of which of 100 classes 3 % are right, is no reason to doubt them all."""
    crowd = simulate(8, n_classes=n_classes, per_task=1, signal=0.01)
    found = consensus(crowd.logits, start(crowd), crowd.answers)
    label = torch.from_numpy(crowd.answers.label)
    assert (found.posterior.argmax(1) == label).double().mean() > 0.95
    assert 0.55 < float(found.posterior.amax(1).mean()) < 0.75


def test_of_single_answers_nothing_can_be_told() -> None:
    crowd = simulate(8, per_task=1, overconfidence=4)
    assert predictive_temperature(crowd.logits, start(crowd), crowd.answers, 1.7) == 1.7


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
    whole = predictive_temperature(crowd.logits, start(crowd), crowd.answers, 1.0)
    monkeypatch.setattr(module, "ANSWERS_TO_FIT", 2000)
    sampled = predictive_temperature(crowd.logits, start(crowd), crowd.answers, 1.0)
    assert whole / 2 <= sampled <= 2 * whole


def test_answers_that_stand_alone_take_no_room_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tasks of three answers, and a thousand of one, which say nothing of a temperature."""
    some, single = simulate(0, n_tasks=10, n_workers=5, per_task=3), np.arange(10, 1010)
    parts = ((some.answers.task, single), (some.answers.worker, single % 5), (some.answers.label, single % 3))
    answers = Answers(1010, 5, *(np.concatenate(part) for part in parts))
    logits = torch.cat([some.logits, torch.zeros(1000, some.logits.shape[1])])
    sizes: list[int] = []

    def noted(logits: Tensor, likelihood: Tensor, answers: Answers) -> float:
        sizes.append(len(answers))
        return 0.0

    monkeypatch.setattr(module, "ANSWERS_TO_FIT", 15)
    monkeypatch.setattr(module, "_predicts", noted)
    predictive_temperature(logits, start(some), answers, 1.0)
    assert set(sizes) == {15}
