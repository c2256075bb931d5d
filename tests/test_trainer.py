"""The loop, on tasks of a second."""

from __future__ import annotations

import io
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from crowdlayer.answers import Answers
from crowdlayer.data.images import CrowdLoader
from crowdlayer.data.pixels import normalise
from crowdlayer.errors import DeviceMemoryError, InterruptedRunError, SettingsError
from crowdlayer.learning.aggregation import dawid_skene
from crowdlayer.learning.crowd_layer import WORKER_MODELS, CrowdLayer
from crowdlayer.learning.crowd_model import CrowdLoss
from crowdlayer.learning.devices import enough_memory, make_accelerator, precision
from crowdlayer.learning.optimization import make_optimizer, make_scheduler
from crowdlayer.learning.progress import Best, Progress
from crowdlayer.learning.regularizers import Name
from crowdlayer.learning.tensors import read_tensors
from crowdlayer.learning.trainer import Trainer, Validation, Watch
from crowdlayer.machine.processes import Processes
from crowdlayer.settings import TrainingSettings

CPU = torch.device("cpu")
N_CLASSES = 3


class Small(nn.Module):
    """A classifier of a few weights, with batch norm and dropout as the big ones have."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.dropout(self.features(x).flatten(1)))
        return logits


def coloured(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 8, 8, 3) noisy images of three colours, and which."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 90, (n, 8, 8, 3))
    images[np.arange(n), :, :, labels] += 120
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


def noisy(labels: torch.Tensor, right: float = 0.8, n_workers: int = 4, seed: int = 0) -> Answers:
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(labels)), 2)
    worker = np.concatenate([rng.choice(n_workers, 2, replace=False) for _ in range(len(labels))])
    truth = labels.numpy()[task]
    label = np.where(rng.random(len(task)) < right, truth, rng.integers(0, N_CLASSES, len(task)))
    return Answers(len(labels), n_workers, task, worker, label)


def make(n: int = 33, with_truth: bool = True, dropout: float = 0.0, **options: Any) -> Trainer:
    options = {"n_epochs": 3, "lr": 0.05, "batch_size": 8, "img_size": 8, "verbose": False} | options
    settings = TrainingSettings(**options)
    images, labels = coloured(n)
    held, truth = coloured(12, seed=1)
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator(settings)
    loader = CrowdLoader(
        images, noisy(labels), settings.batch_size, settings.seed, False, accelerator.device, Processes.joined()
    )
    validation = Validation(held, truth if with_truth else None, None if with_truth else noisy(truth, seed=2))
    classifier = Small(dropout)
    if settings.freeze:
        classifier.requires_grad_(False)
        classifier.fc.requires_grad_(True)
    return Trainer(settings, accelerator, classifier, N_CLASSES, loader, validation)


def same(a: Best, b: Best) -> bool:
    pairs = (a.classifier, b.classifier), (a.crowd_layer, b.crowd_layer)
    return all(
        ours.keys() == theirs.keys() and all(map(torch.equal, ours.values(), theirs.values())) for ours, theirs in pairs
    )


def test_it_learns_the_classes_and_the_workers() -> None:
    trainer = make(n=90, n_epochs=8)
    best = trainer.fit()
    trainer.load(best)
    images, labels = coloured(30, seed=5)
    assert (trainer.predict(images).argmax(1) == labels).float().mean() > 0.9
    assert not torch.equal(best.crowd_layer["confusion"], torch.eye(N_CLASSES).expand(4, -1, -1))
    assert len(trainer.history.train_loss) == len(trainer.history.val_loss) == len(trainer.history.val_accuracy) == 8


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(optimizer: str) -> None:
    first, again, other = (make(dropout=0.3, seed=seed, optimizer=optimizer, lr=0.01).fit() for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_the_loss_is_the_mean_per_task_whatever_the_reduction() -> None:
    """With a learning rate too small to move anything, the epoch's loss is that of the data set at the start."""
    for reduction in ("task", "answer"):
        trainer = make(lr=1e-12, n_epochs=1, loss_reduction=reduction, batch_size=33)
        trainer.fit()
        images, labels = coloured(33)
        answers = noisy(labels)
        torch.manual_seed(0)
        classifier = Small()
        with torch.no_grad():
            scores = CrowdLayer(4, N_CLASSES)(
                classifier(normalise(images, CPU)), torch.from_numpy(answers.task), torch.from_numpy(answers.worker)
            )
            expected = CrowdLoss("task")(scores, torch.from_numpy(answers.label), 33).item()
        assert trainer.history.train_loss[0] == pytest.approx(expected, rel=1e-5)


def test_decay_touches_the_classifier_only() -> None:
    """No answer moves the matrix of a worker who gave none: it stays at the identity, however large the decay."""
    trainer = make(decay=0.5, n_epochs=2)
    silent = noisy(coloured(33)[1], n_workers=3)
    trainer.train = CrowdLoader(coloured(33)[0], silent, 8, 0, False, trainer.accelerator.device)
    before = trainer.learner.model.classifier.get_parameter("fc.weight").norm().item()
    trainer.fit()
    assert torch.equal(trainer.learner.model.confusion[3].detach(), torch.eye(N_CLASSES))
    assert not torch.equal(trainer.learner.model.confusion[0].detach(), torch.eye(N_CLASSES))
    assert trainer.learner.model.classifier.get_parameter("fc.weight").norm().item() < before
    groups = make_optimizer(trainer.learner.model, trainer.settings).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_scale_pulls_the_matrices_to_the_identity() -> None:
    def distance(scale: float) -> float:
        best = make(n=90, n_epochs=4, scale=scale, select_by="last").fit()
        return float((best.crowd_layer["confusion"] - torch.eye(N_CLASSES)).norm())

    assert distance(0.5) < 0.5 * distance(0.0)


def test_the_crowd_starts_where_the_answers_alone_put_it_and_is_held_while_it_warms_up() -> None:
    trainer = make(n_epochs=2, crowd_warmup=2, crowd_start="dawid-skene", crowd_layer="stochastic")
    start = dawid_skene(noisy(coloured(33)[1]), N_CLASSES).confusion
    torch.testing.assert_close(trainer.learner.model.confusion.detach(), start)
    before = trainer.learner.model.classifier.get_parameter("fc.weight").detach().clone()
    best = trainer.fit()
    torch.testing.assert_close(best.crowd_layer["weight"].softmax(2), start)
    assert not torch.equal(best.classifier["fc.weight"], before)
    later = make(n_epochs=3, crowd_warmup=2, crowd_start="dawid-skene", crowd_layer="stochastic", select_by="last")
    assert not torch.allclose(later.fit().crowd_layer["weight"].softmax(2), start)


@pytest.mark.parametrize("crowd_layer", WORKER_MODELS)
def test_every_worker_model_trains_is_chosen_and_comes_back(crowd_layer: str) -> None:
    for with_truth in (True, False):
        trainer = make(n=60, crowd_layer=crowd_layer, with_truth=with_truth, select_by="calibrated_loss", lr_crowd=0.5)
        best = trainer.fit()
        for weight in trainer.learner.crowd_layer.parameters():
            weight.data.zero_()
        trainer.load(best)
        chosen = trainer.learner.crowd_layer
        assert not torch.equal(chosen.matrices(), WORKER_MODELS[crowd_layer](4, N_CLASSES).matrices())
        assert all(torch.equal(weight, best.crowd_layer[name]) for name, weight in chosen.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"loss_reduction": "answer"}, {"mixup": 0.5}])
def test_a_tasks_label_counts_as_often_as_the_task_has_answers(options: dict[str, Any]) -> None:
    """Of workers who are always right the labels teach what the answers do, to the bit: a step is as long with SGD."""
    _, truth = coloured(33)
    by_answers, by_labels = make(**options), make(**options)
    by_answers.train = by_answers.train.with_answers(noisy(truth, right=1))
    by_answers.learner.plain = True
    by_labels.learn_labels(truth.numpy())
    assert same(by_answers.fit(), by_labels.fit())
    by_labels.learn_labels(np.where(truth == 0, -1, truth))
    left = by_labels.train.answers
    assert (set(left.task), set(left.label)) == (set(np.flatnonzero(truth)), {1, 2})


@pytest.mark.parametrize("crowd_layer", ["matrix", "stochastic"])
def test_it_learns_from_mixed_answers(crowd_layer: str) -> None:
    trainer = make(n=90, n_epochs=10, mixup=0.5, crowd_layer=crowd_layer)
    trainer.load(trainer.fit())
    images, labels = coloured(30, seed=5)
    assert (trainer.predict(images).argmax(1) == labels).float().mean() > 0.9


def test_large_crowds_are_moved_row_by_row_unless_a_regulariser_looks_at_all_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not make().learner.crowd_layer.row_wise
    monkeypatch.setattr("crowdlayer.learning.aggregation.ROWS_FROM", 10)
    assert make().learner.crowd_layer.row_wise
    assert not make(crowd_updates="dense").learner.crowd_layer.row_wise
    assert not make(scale=0.1).learner.crowd_layer.row_wise
    assert not caplog.records
    assert not make(scale=0.1, crowd_updates="rows").learner.crowd_layer.row_wise
    assert "CROWD_UPDATES=rows is not kept: REGULARIZER=identity moves every worker in each step" in caplog.text
    assert make(scale=0.1, regularizer="geo-f").learner.crowd_layer.row_wise


def test_it_learns_row_by_row() -> None:
    trainer = make(n=90, n_epochs=8, crowd_updates="rows", crowd_layer="stochastic", lr_crowd=0.5)
    best = trainer.fit()
    trainer.load(best)
    images, labels = coloured(30, seed=5)
    assert (trainer.predict(images).argmax(1) == labels).float().mean() > 0.9
    assert not torch.equal(best.crowd_layer["weight"], WORKER_MODELS["stochastic"](4, N_CLASSES).state_dict()["weight"])


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept() -> None:
    """An average that hardly moves stays where the first step came to; the last weights do not."""
    trainer = make(n_epochs=4, ema=0.99999, select_by="last", mixed_precision="bf16", batch_size=33)
    images = coloured(5)[0]
    trainer.train_epoch(trainer.learner, trainer.train, Progress())
    after_one_step = trainer.predict(images)
    best = trainer.fit()
    torch.testing.assert_close(trainer.predict(images), after_one_step, rtol=0, atol=0.02)
    last = trainer.learner.model.classifier.get_parameter("fc.weight")
    assert (last - best.classifier["fc.weight"]).abs().max() > 0.02
    trainer.load(best)
    torch.testing.assert_close(trainer.predict(images), after_one_step, rtol=0, atol=0.02)


def test_the_crowd_has_a_learning_rate_of_its_own() -> None:
    groups = make(lr=0.1, lr_crowd=0.02).learner.scheduler.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.02]
    assert [group["lr"] for group in make(lr=0.1).learner.scheduler.optimizer.param_groups] == [0.1, 0.1]


def test_a_frozen_backbone_keeps_weights_and_statistics() -> None:
    trainer = make(freeze=True, dropout=0.5)
    before = {name: tensor.clone() for name, tensor in trainer.learner.model.classifier.state_dict().items()}
    best = trainer.fit()
    changed = {name for name, tensor in best.classifier.items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def scores(trainer: Trainer) -> list[float]:
    """What SELECT_BY made of each epoch, by repeating its rule on the history."""
    history = trainer.history
    match trainer.settings.select_by:
        case "loss":
            return [value for value in history.val_loss if value is not None]
        case "accuracy":
            return [-value for value in history.val_accuracy if value is not None]
        case _:
            return list(range(len(history.val_loss), 0, -1))


@pytest.mark.parametrize("rule", ["loss", "accuracy", "last"])
def test_the_rule_picks_the_epoch(rule: str) -> None:
    trainer = make(n_epochs=6, lr=0.2, select_by=rule)
    best = trainer.fit()
    assert best.epoch == int(np.argmin(scores(trainer))) + 1


def test_the_calibrated_loss_is_never_above_the_loss() -> None:
    trainer = make(select_by="calibrated_loss")
    logits = trainer.predict(trainer.validation.images) * 20
    loss, score, _ = trainer.validate(logits)
    assert score < loss
    without_truth = make(select_by="calibrated_loss", with_truth=False)
    loss, score, figures = without_truth.validate(logits)
    assert score < loss
    assert figures == {}


def test_without_truth_the_held_out_answers_choose() -> None:
    trainer = make(with_truth=False)
    best = trainer.fit()
    assert trainer.history.val_accuracy == [None] * 3
    assert best.epoch == int(np.argmin([value or math.inf for value in trainer.history.val_loss])) + 1
    trainer.load(best)
    held, truth = coloured(12, seed=1)
    answers = noisy(truth, seed=2)
    layer = CrowdLayer.of(best.crowd_layer["confusion"])
    with torch.no_grad():
        expected = CrowdLoss("task")(
            layer(trainer.predict(held), torch.from_numpy(answers.task), torch.from_numpy(answers.worker)),
            torch.from_numpy(answers.label),
            12,
        ).item()
    assert trainer.history.val_loss[best.epoch - 1] == pytest.approx(expected, rel=1e-5)


def test_accuracy_cannot_choose_without_truth() -> None:
    with pytest.raises(SettingsError, match="SELECT_BY: accuracy needs true labels"):
        make(with_truth=False, select_by="accuracy")


@pytest.mark.parametrize("regularizer", get_args(Name))
def test_a_loss_that_is_not_finite_stops_with_the_setting_to_change(regularizer: Name) -> None:
    with pytest.raises(SettingsError, match=r"must be finite, is (nan|inf) in epoch \d+: lower LR=1e\+20$"):
        make(lr=1e20, n_epochs=5, scale=0.01, regularizer=regularizer).fit()


def test_the_workers_own_rate_may_be_the_one_to_lower() -> None:
    with pytest.raises(SettingsError, match=r"lower LR=0\.05 or LR_CROWD=1e\+30$"):
        make(lr=0.05, lr_crowd=1e30, n_epochs=5).fit()


@pytest.mark.parametrize(("batch_size", "freeze", "few"), [(7, False, True), (8, False, False), (7, True, False)])
def test_batch_norms_statistics_of_few_images_may_be_what_blows_up(batch_size: int, freeze: bool, few: bool) -> None:
    """Where steps have finite losses, each by its own statistics, and evaluations, by the running ones, have not."""
    trainer = make(batch_size=batch_size, freeze=freeze)
    also = ", or raise BATCH_SIZE=7: batch norm sees at most 7 images at once" if few else ""
    with pytest.raises(SettingsError, match=rf"^val_loss: must be finite, is inf in epoch 1: lower LR=0\.05{also}$"):
        trainer._finite(1, 1.5, math.inf)
    with pytest.raises(SettingsError, match=r"^train_loss: .*lower LR=0\.05$"):
        trainer._finite(1, math.inf, math.inf)


def test_out_of_memory_is_said_with_the_settings_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()

    def full(self: Small, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Small, "forward", full)
    with pytest.raises(DeviceMemoryError, match="BATCH_SIZE=8 and IMG_SIZE=8"), enough_memory(trainer.settings):
        trainer.fit()


def test_the_cpus_own_word_for_out_of_memory_is_understood() -> None:
    settings = TrainingSettings()
    with pytest.raises(DeviceMemoryError), enough_memory(settings):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), enough_memory(settings):
        torch.zeros(3).view(2)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"scheduler": "multistep", "milestones": (1, 3), "lr_decay": 0.1}, [1, 0.1, 0.1, 0.01]),
        ({"scheduler": "none"}, [1, 1, 1, 1]),
        ({"scheduler": "cosine"}, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ],
)
def test_schedulers_step_once_per_epoch(options: dict[str, Any], rates: list[float]) -> None:
    settings = TrainingSettings(lr=1.0, n_epochs=4, **options)
    optimizer = make_optimizer(make().learner.model, settings)
    scheduler = make_scheduler(optimizer, settings)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [pair[0] for pair in seen] == pytest.approx(rates)
    assert all(a == b for a, b in seen)


def test_precision_auto_is_full_on_a_cpu_and_fp16_needs_a_gpu() -> None:
    assert precision(TrainingSettings()) == "no"
    with pytest.raises(SettingsError, match="MIXED_PRECISION: fp16 needs a GPU"):
        precision(TrainingSettings(mixed_precision="fp16"))


def test_bf16_trains_and_predicts_in_float32() -> None:
    trainer = make(mixed_precision="bf16", n_epochs=2)
    best = trainer.fit()
    assert best.crowd_layer["confusion"].dtype == torch.float32
    assert trainer.predict(coloured(4)[0]).dtype == torch.float32


class StopAt(Watch):
    """Asks for a stop before the step of that number, counting evaluation's batches too."""

    def __init__(self, number: int) -> None:
        self.left = number

    def stop(self) -> bool:
        self.left -= 1
        return self.left < 0


def saved(trainer: Trainer) -> io.BytesIO:
    """The trainer's state, as a file."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    return file


def resumed(number: int, **options: Any) -> Trainer:
    """A trainer that is to go on from where another was stopped, by `StopAt` this number."""
    stopped = make(**options)
    stopped.watch = StopAt(number)
    with pytest.raises(InterruptedRunError):
        stopped.fit()
    trainer = make(**options)
    trainer.load_state_dict(read_tensors(saved(stopped)))
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("number", [0, 1, 5, 6, 12])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(optimizer: str, number: int) -> None:
    """In the first step, within an epoch, in the evaluation, right after an epoch, in a later one."""
    options: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01, "dropout": 0.3, "scheduler": "cosine"}
    if number % 2:
        options |= {"mixup": 0.5, "ema": 0.9, "crowd_layer": "stochastic", "crowd_warmup": 1, "crowd_updates": "rows"}
    whole = make(**options)
    expected = whole.fit()
    trainer = resumed(number, **options)
    best = trainer.fit()
    assert same(best, expected)
    assert (best.epoch, best.score, best.figures) == (expected.epoch, expected.score, expected.figures)
    assert [trainer.history.train_loss, trainer.history.val_loss, trainer.history.lr] == [
        whole.history.train_loss,
        whole.history.val_loss,
        whole.history.lr,
    ]
