"""Warnings come where there is reason, name the setting that helps, and are silent elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from crowdlayer.answers import Answers
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.learning import advice
from crowdlayer.learning.progress import History
from crowdlayer.settings import TrainingSettings

SOUND: dict[str, Any] = {"n_epochs": 100, "milestones": (50,), "batch_size": 64, "img_size": 32}


def crowd(n_tasks: int, n_workers: int, per_task: int = 3) -> CrowdImages:
    """Tasks of as many answers each, shared out evenly; so are the labels."""
    task = np.repeat(np.arange(n_tasks), per_task)
    worker = np.arange(len(task)) % n_workers
    names = [f"train/{i}.png" for i in range(n_tasks)]
    answers = Answers(n_tasks, n_workers, task, worker, np.arange(len(task)) % 10)
    return CrowdImages(names, [str(i) for i in range(n_tasks)], answers, np.full(n_tasks, -1))


def data(
    n_tasks: int = 1000, n_workers: int = 20, n_classes: int = 10, n_held_out: int | None = None, per_task: int = 3
) -> Dataset:
    val = LabelledImages(["val/0/a.png"], np.array([0])) if n_held_out is None else None
    held_out = None if n_held_out is None else crowd(n_held_out, n_workers)
    classes = [str(i) for i in range(n_classes)]
    train = crowd(n_tasks, n_workers, per_task)
    return Dataset("d", classes, [str(i) for i in range(n_workers)], train, held_out, val, None)


def history(train_loss: Sequence[float], with_truth: bool = True) -> History:
    return History(train_loss=list(train_loss), val_accuracy=[50.0 if with_truth else None] * len(train_loss))


def warnings_before(dataset: Dataset, **settings: Any) -> list[str]:
    return list(advice.before(dataset, TrainingSettings(**SOUND | settings)))


def test_a_sound_run_has_no_warnings() -> None:
    assert warnings_before(data()) == []
    assert warnings_before(data(n_held_out=100), select_by="last") == []
    assert warnings_before(data(n_workers=600), crowd_layer="stochastic", crowd_start="dawid-skene") == []
    assert warnings_before(data(per_task=2)) == []
    assert warnings_before(data(n_tasks=24, n_workers=3), batch_size=8) == []  # three steps, and none could be smaller


@pytest.mark.parametrize(
    ("dataset", "settings", "remedy"),
    [
        (data(), {"n_epochs": 20}, "consider MILESTONES=10 or SCHEDULER=cosine"),
        (data(n_tasks=100), {}, "an epoch of 100 tasks has 2 steps: consider BATCH_SIZE=8"),
        (data(), {"img_size": 224}, "1000 images are few to train resnet18 from scratch: consider PRETRAINED=true"),
        (
            data(n_held_out=10),
            {"select_by": "last"},
            "10 held-out tasks, which are few: add val/, or raise VAL_FRACTION",
        ),
        (data(n_held_out=100), {}, "consider SELECT_BY=last with SCHEDULER=cosine"),
        (data(), {"regularizer": "pooled"}, "weighs nothing with SCALE=0: consider SCALE=0.001"),
        (
            data(per_task=1),
            {},
            "the qualities in workers.csv say little: consider FOLDS=5, or several answers for each task",
        ),
        (data(n_classes=11), {}, "nobody answered 10: what no answer says is not learnt: consider CLASSES without it"),
        (data(n_workers=600), {}, "600 of 600 workers gave fewer answers than there are classes"),
    ],
)
def test_a_reason_to_warn_has_one_warning_with_its_remedy(
    dataset: Dataset, settings: dict[str, Any], remedy: str
) -> None:
    (warning,) = warnings_before(dataset, **settings)
    assert remedy in warning


@pytest.mark.parametrize(
    ("train_loss", "best", "remedy"),
    [
        ([2.0, 1.5, 1.2, 1.0], 3, None),
        ([2.0, 1.5, 1.2, 1.0], 4, "the best epoch is the last: consider more than N_EPOCHS=100"),
        ([2.0, 1.5, 1.2, 1.0], 1, "nothing was gained after epoch 1 of 4"),
        ([2.0, 2.1, 2.2, 2.3], 1, "train_loss did not fall in 4 epochs: consider a lower LR than 0.1"),
        ([2.0, 1.0], 2, None),
    ],
)
def test_what_the_training_tells(train_loss: Sequence[float], best: int, remedy: str | None) -> None:
    found = list(advice.after(history(train_loss), best, TrainingSettings(**SOUND)))
    assert found == [] if remedy is None else remedy in found[0]


@pytest.mark.parametrize(
    ("select_by", "with_truth", "rules"),
    [
        ("loss", True, "accuracy or calibrated_loss"),
        ("accuracy", True, "calibrated_loss"),
        ("calibrated_loss", True, "accuracy"),
        ("loss", False, "last"),
        ("calibrated_loss", False, "last"),
    ],
)
def test_the_rules_that_are_advised_are_others_and_can_be_had(select_by: str, with_truth: bool, rules: str) -> None:
    """Accuracy needs true labels: a run that is told to choose by it without any is refused."""
    settings = TrainingSettings(**SOUND | {"select_by": select_by})
    (advised,) = advice.after(history([2.0, 1.5, 1.2, 1.0], with_truth), 1, settings)
    assert advised.endswith(f", or SELECT_BY={rules}")


@pytest.mark.parametrize(
    ("ours", "theirs", "n_epochs", "said"),
    [(36.3, 39.2, 100, True), (39.2, 39.2, 100, False), (None, None, 100, False), (36.3, 39.2, 2, False)],
)
def test_a_run_does_not_end_below_majority_vote_without_a_word(
    ours: float | None, theirs: float | None, n_epochs: int, said: bool
) -> None:
    figures = {"train_accuracy": ours, "majority_vote_accuracy": theirs}
    found = list(advice.beside_majority(figures, TrainingSettings(**SOUND | {"n_epochs": n_epochs})))
    assert [line.partition(": ")[0] for line in found] == (
        ["of the inferred labels 36.3 % are right, of majority vote's 39.2 %"] if said else []
    )


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "the recommended settings of crowdlayer/docs/quality.md"),
        ({"crowd_start": "dawid-skene", "crowd_layer": "stochastic"}, "the recommended settings"),
        ({"crowd_start": "dawid-skene", "crowd_layer": "stochastic", "mixup": 0.5}, "FOLDS=5"),
        (
            {"crowd_start": "dawid-skene", "crowd_layer": "stochastic", "mixup": 0.5, "folds": 5},
            "another LR, more N_EPOCHS or PRETRAINED",
        ),
    ],
)
def test_who_is_below_majority_vote_is_advised_what_is_not_done_already(settings: dict[str, Any], remedy: str) -> None:
    figures = {"train_accuracy": 70.0, "majority_vote_accuracy": 75.0}
    (said,) = advice.beside_majority(figures, TrainingSettings(**SOUND | settings))
    assert f": consider {remedy}" in said


@pytest.mark.parametrize(("twice", "said"), [(400, True), (600, False)])
def test_where_most_tasks_have_one_answer_it_is_said(twice: int, said: bool) -> None:
    task = np.concatenate([np.arange(1000), np.arange(twice)])
    task.sort()
    train = replace(crowd(1000, 20, per_task=1), answers=Answers(1000, 20, task, task % 20, np.arange(len(task)) % 10))
    warned = warnings_before(replace(data(), train=train))
    assert [line.partition(": ")[0] for line in warned] == (["600 of 1000 tasks have one answer"] if said else [])
    assert warnings_before(replace(data(), train=train), folds=5) == []


def test_who_takes_the_last_epoch_is_not_told_that_it_is_the_last() -> None:
    assert list(advice.after(history([2.0, 1.5, 1.0]), 3, TrainingSettings(**SOUND | {"select_by": "last"}))) == []
