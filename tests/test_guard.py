"""A run that collapses says so, and does not end below majority vote."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from crowdlayer.answers import Answers, majority_vote
from crowdlayer.learning import metrics
from crowdlayer.learning.further import Further
from crowdlayer.learning.guard import Guard
from crowdlayer.learning.progress import Best
from crowdlayer.learning.spool import Identity, Spool
from crowdlayer.learning.trainer import Trainer, Watch
from crowdlayer.machine.processes import Processes
from crowdlayer.machine.watchdog import Watchdog
from crowdlayer.report.trackers import Trackers
from crowdlayer.training import Keeper
from tests.bench.crowds import Share, answered, pattern_pool, share
from tests.bench.quality import make_trainer
from tests.gang import together
from tests.test_trainer import make

N_CLASSES = 100


def like_cifar_100n(n_train: int, seed: int = 0) -> Share:
    """100 classes, one answer each, 40 % of them wrong."""
    rng = np.random.default_rng(seed)
    pool = pattern_pool(n_train + 100, N_CLASSES, 16, rng)
    pool = replace(pool, answers=answered(pool.truth, N_CLASSES, "few", rng))
    return share(pool, seed, 0, 20, n_train, None)


def trained(part: Share, n_epochs: int, **options: Any) -> Trainer:
    common = {"optimizer": "adam", "lr": 0.003, "scheduler": "cosine", "select_by": "last"}
    return make_trainer(part, 16, common | {"n_epochs": n_epochs} | options, "small", 0)


def accuracy_on_test(trainer: Trainer, best: Best, part: Share) -> float:
    trainer.load(best)
    return metrics.accuracy(trainer.predict(part.test).argmax(1), part.test_labels)


def test_a_collapse_is_said_and_the_run_ends_at_least_at_majority_vote(caplog: pytest.LogCaptureFixture) -> None:
    part = like_cifar_100n(1500)
    left_alone = trained(part, 6, guard=False)
    guarded = trained(part, 6)
    by_majority = trained(part, 6, labels="majority")
    with caplog.at_level(logging.WARNING):
        accuracies = {
            name: accuracy_on_test(trainer, trainer.fit(), part)
            for name, trainer in {"alone": left_alone, "guarded": guarded, "majority": by_majority}.items()
        }
    assert left_alone.collapsed_since is not None
    assert left_alone.collapsed_since == guarded.collapsed_since
    assert by_majority.collapsed_since is None
    assert accuracies["alone"] < accuracies["majority"] / 2
    assert accuracies["guarded"] >= accuracies["majority"] - 1
    said = [record.message for record in caplog.records]
    assert (
        said[0]
        == f"collapsed since epoch {guarded.collapsed_since}: the classifier learns little of what the crowd says"
    )
    assert said[1] == said[0] + "; starting again with CROWD_LAYER=stochastic held at CROWD_START=dawid-skene"
    assert len(guarded.history.train_loss) == 6
    assert guarded.settings.crowd_layer == "stochastic"


@pytest.mark.slow
def test_no_seed_ends_below_majority_vote() -> None:
    gains = []
    for seed in range(5):
        part = like_cifar_100n(3000, seed)
        guarded, by_majority = trained(part, 10), trained(part, 10, labels="majority")
        gains.append(
            accuracy_on_test(guarded, guarded.fit(), part) - accuracy_on_test(by_majority, by_majority.fit(), part)
        )
    assert min(gains) >= 0, gains
    print(f"gains over majority vote: {gains}")


class Stopping(Watch):
    """Keeps the state after some epochs, and stops."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def epoch_done(self, trainer: Trainer) -> None:
        self.left -= 1
        if self.left == 0:
            self.state = trainer.state_dict()
            raise StopIteration


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_run_that_is_resumed_before_or_after_its_collapse_comes_to_the_same(epochs: int) -> None:
    part = like_cifar_100n(400)
    whole = trained(part, 4)
    best = whole.fit()
    assert whole.collapsed_since is not None
    stopped, resumed = trained(part, 4), trained(part, 4)
    stopped.watch = Stopping(epochs)
    with pytest.raises(StopIteration):
        stopped.fit()
    resumed.load_state_dict(stopped.watch.state)
    again = resumed.fit()
    assert resumed.collapsed_since == whole.collapsed_since
    assert resumed.history.train_loss == whole.history.train_loss
    assert all(torch.equal(best.classifier[name], again.classifier[name]) for name in best.classifier)
    assert torch.equal(best.crowd_layer["weight"], again.crowd_layer["weight"])


def test_a_run_that_starts_again_moves_its_weights_whatever_is_evaluated() -> None:
    """The averaged ones follow; they are not what is trained."""
    trainer = trained(like_cifar_100n(400), 4, ema=0.9)
    first = {name: weight.clone() for name, weight in trainer.classifier.state_dict().items()}
    best = trainer.fit()
    assert trainer.collapsed_since is not None
    assert not any(torch.equal(best.classifier[name], first[name]) for name in first if name.endswith("weight"))
    averaged, moved = trainer.classifier.state_dict(), trainer.learner.model.classifier.state_dict()
    assert not torch.equal(averaged["fc.weight"], moved["fc.weight"])


def test_a_collapse_does_not_end_a_job(tmp_path: Path) -> None:
    """Whose watch tells its trackers of every epoch, and saves."""
    trainer = trained(like_cifar_100n(400), 4)
    (tmp_path / "spool").mkdir()
    spool = Spool(tmp_path / "spool", Identity({}, "data"))
    trainer.watch = Keeper(spool, 1, Watchdog(600), Trackers({}, {}), Further())
    trainer.fit()
    assert trainer.collapsed_since is not None
    assert len(trainer.history.train_loss) == 4
    assert max(int(path.stem) for path in spool.folder.glob("*.json")) > 4


def guarded() -> tuple[int | None, list[float], torch.Tensor]:
    trainer = trained(like_cifar_100n(400), 4, crowd_updates="rows")
    best = trainer.fit()
    return trainer.collapsed_since, trainer.history.train_loss, best.classifier["fc.weight"]


@pytest.mark.slow
def test_several_processes_fall_back_together() -> None:
    first, second = together(2, guarded)
    assert first[0] is not None
    assert first[0] == second[0]
    assert len(first[1]) == 4
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])


def crowd(n: int = 300, n_classes: int = 5) -> Answers:
    rng = np.random.default_rng(1)
    truth = rng.integers(n_classes, size=n)
    task = np.repeat(np.arange(n), 2)
    label = np.where(rng.random(2 * n) < 0.8, truth[task], rng.integers(n_classes, size=2 * n))
    return Answers(n, 7, task, rng.integers(7, size=2 * n), label)


def one_epoch(guard: Guard, answers: Answers, predicted: np.ndarray, epoch: int) -> bool:
    logits = torch.nn.functional.one_hot(torch.from_numpy(predicted), 5).float()
    guard.see(logits, torch.from_numpy(answers.task), torch.from_numpy(answers.label))
    return guard.collapsed(epoch)


def test_majority_votes_agreement_is_cohens_kappa() -> None:
    answers = crowd()
    majority = majority_vote(answers, 5)
    agreement, diversity = Guard(answers, 5, 10, Processes()).majority
    assert agreement == pytest.approx(cohen_kappa_score(majority[answers.task], answers.label), abs=1e-3)
    share = np.bincount(majority) / len(majority)
    assert diversity == pytest.approx(np.exp(-(share * np.log(share)).sum()) - 1)


def test_only_poor_epochs_in_a_row_are_a_collapse() -> None:
    answers = crowd()
    good, one_class = majority_vote(answers, 5), np.zeros(300, dtype=np.int64)
    guard = Guard(answers, 5, 10, Processes())
    epochs = [one_class, one_class, good, one_class, one_class, one_class]
    assert [one_epoch(guard, answers, x, i) for i, x in enumerate(epochs, 1)] == [False] * 5 + [True]
    assert guard.suspicious_since == 4


def test_many_classes_without_agreement_or_agreement_on_few_classes_are_no_collapse() -> None:
    answers = crowd()
    any_class = np.random.default_rng(2).integers(5, size=300)
    guard = Guard(answers, 5, 10, Processes())
    assert not any(one_epoch(guard, answers, any_class, epoch) for epoch in range(1, 9))


def test_a_classifier_that_is_only_slow_is_left_alone() -> None:
    answers = Answers(64, 1, np.arange(64), np.zeros(64, dtype=np.int64), np.arange(64))
    guard = Guard(answers, 64, 10, Processes())
    for epoch, n_predicted in enumerate((2, 2, 4, 4, 10, 10, 25), 1):
        logits = torch.nn.functional.one_hot(torch.arange(64) % n_predicted, 64).float()
        guard.see(logits, torch.arange(64), torch.arange(64))
        assert not guard.collapsed(epoch)


@pytest.mark.parametrize(
    ("n_classes", "others", "expected"),
    [
        (5, [0.07, 0.0, 0.03, 0.2], [False, False, False, False]),
        (5, [0.07, 0.0, 0.005], [False, False, True]),
        (100, [0.3, 0.05, 0.1], [False, False, True]),
    ],
    ids=["grows", "hardly grows", "grows from next to nothing"],
)
def test_what_untrained_weights_predict_by_chance_is_no_beginning(
    n_classes: int, others: list[float], expected: list[bool]
) -> None:
    """Where most answers are one class the first epochs come to predict that alone; growth counts from there."""
    rng, n = np.random.default_rng(0), 2000

    def some(of_others: float) -> np.ndarray:
        """Class 0, but for a share."""
        return np.where(rng.random(n) < of_others, rng.integers(1, n_classes, n), 0)

    answers = Answers(n, 1, np.arange(n), np.zeros(n, dtype=np.int64), some(0.2 if n_classes == 5 else 0.99))
    guard = Guard(answers, n_classes, 10, Processes())
    verdicts = []
    for epoch, of_others in enumerate(others, 1):
        logits = torch.nn.functional.one_hot(torch.from_numpy(some(of_others)), n_classes).float()
        guard.see(logits, torch.arange(n), torch.from_numpy(answers.label))
        verdicts.append(guard.collapsed(epoch))
    assert verdicts == expected


def test_mixup_hides_no_agreement() -> None:
    """The answer that counts is that to the image of which more is seen."""
    trainer = make(n=120, n_epochs=10, mixup=0.5)
    trainer.fit()
    agreement = [figures["crowd/agreement"] for figures in trainer.history.figures[5:]]
    assert np.mean(agreement) > 0.7 * trainer.guard.majority[0]


def test_long_runs_get_more_time() -> None:
    answers, one_class = crowd(), np.zeros(300, dtype=np.int64)
    guard = Guard(answers, 5, 100, Processes())
    assert [one_epoch(guard, answers, one_class, epoch) for epoch in range(1, 11)] == [False] * 9 + [True]
