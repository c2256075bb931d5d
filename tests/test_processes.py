"""N processes do what one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crowdlayer.answers import Answers
from crowdlayer.data.images import CrowdLoader
from crowdlayer.errors import CrowdlayerError, SettingsError
from crowdlayer.learning.devices import laid_out, make_accelerator, synchronised
from crowdlayer.learning.spool import Identity
from crowdlayer.learning.trainer import Trainer, Validation
from crowdlayer.machine.cpus import cpus
from crowdlayer.machine.processes import Processes
from crowdlayer.settings import TrainingSettings
from crowdlayer.training import same_everywhere
from tests.gang import together

CPU = torch.device("cpu")
N_CLASSES = 3


class Plain(nn.Module):
    """A classifier without batch norm, which alone is different when each process has a share of the batch."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(16, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.features(x).flatten(1))
        return logits


def data(n: int) -> tuple[torch.Tensor, torch.Tensor, Answers]:
    """Images, true labels and answers: from none to three a task, none at all for two tasks of three."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % N_CLASSES
    images = rng.integers(0, 90, (n, 8, 8, 3))
    images[np.arange(n), :, :, labels] += 120
    task = np.repeat(np.arange(n), np.where(np.arange(n) % 3 == 0, rng.integers(0, 4, n), 0))
    label = np.where(rng.random(len(task)) < 0.8, labels[task], rng.integers(0, N_CLASSES, len(task)))
    answers = Answers(n, 4, task, rng.integers(0, 4, len(task)), label)
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels), answers


def make(norm: nn.Module, **options: Any) -> Trainer:
    settings = TrainingSettings(
        **{"n_epochs": 3, "lr": 0.05, "batch_size": 8, "img_size": 8, "verbose": False, "scale": 0.01} | options
    )
    images, labels, answers = data(45)
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator(settings)
    loader = CrowdLoader(images, answers, settings.batch_size, 0, True, accelerator.device, Processes.joined())
    return Trainer(settings, accelerator, Plain(norm), N_CLASSES, loader, Validation(images[:13], labels[:13], None))


@dataclass(frozen=True)
class Run:
    """What a run came to."""

    train_loss: list[float]
    val_loss: list[float | None]
    best_epoch: int
    weights: dict[str, torch.Tensor]
    logits: torch.Tensor


def fit(norm: type[nn.Module], arguments: tuple[int, ...], options: dict[str, Any]) -> Run:
    trainer = make(norm(*arguments), **options)
    best = trainer.fit()
    weights = {name: tensor.clone() for name, tensor in trainer.state_dict()["model"].items()}
    logits = trainer.predict(data(45)[0][:14])
    return Run(trainer.history.train_loss, trainer.history.val_loss, best.epoch, weights, logits)


OPTIONS: list[dict[str, Any]] = [
    {"loss_reduction": "task"},
    {"loss_reduction": "answer", "optimizer": "adam", "lr": 0.003},
    {"crowd_layer": "stochastic", "crowd_updates": "rows", "scale": 0.0},
    {"regularizer": "geo-f", "ema": 0.5},
]


IDENTITIES = (
    ({"lr": 0.1}, {"lr": 0.1}, "data", "data"),
    ({"lr": 0.1}, {"lr": 0.2}, "data", "data"),
    ({"lr": 0.1}, {"lr": 0.1}, "data", "other data"),
)
"""Settings of two processes, and what data they have read."""


def differences() -> list[str]:
    """What `same_everywhere` says of each of the pairs."""
    processes, said = Processes.joined(), []
    for *settings, first, second in IDENTITIES:
        data = (first, second)[processes.index]
        try:
            same_everywhere(Identity({"n_epochs": 3, **settings[processes.index]}, data), processes)
            said.append("")
        except CrowdlayerError as error:
            said.append(f"{error.exit_code} {error}")
    return said


@dataclass(frozen=True)
class Seen:
    """What one process of several has seen."""

    runs: list[Run]
    with_batch_norm: Run
    flags: list[bool]
    rows: torch.Tensor
    refusal: str
    texts: list[str]
    differences: list[str]
    cpus: int
    strides: tuple[int, ...]


def look() -> Seen:
    processes = Processes.joined()
    flags = [processes.any(processes.index == said) for said in (0, 1, 2)]
    rows = processes.gather(torch.full((processes.index * 2 + 1, 2), processes.index))
    try:
        synchronised(nn.BatchNorm2d(2), TrainingSettings(sync_batchnorm="true"))
    except SettingsError as error:
        refusal = str(error)
    else:
        refusal = ""
    texts = processes.gather_texts(f"process {processes.index}\n" + "é" * processes.index)
    across = laid_out(nn.Conv2d(8, 8, 7, padding=3, groups=8))  # whose gradient torch lays out in another way
    across(torch.rand(6, 8, 9, 9)).sum().backward()
    (strides,) = (
        weight.grad.stride() for weight in across.parameters() if weight.dim() == 4 and weight.grad is not None
    )
    runs, with_batch_norm = [fit(nn.Identity, (), one) for one in OPTIONS], fit(nn.BatchNorm2d, (4,), {})
    return Seen(runs, with_batch_norm, flags, rows, refusal, texts, differences(), processes.cpus(), strides)


@pytest.fixture(scope="module")
def two() -> list[Seen]:
    """What two processes that train together have seen."""
    return together(2, look)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_two_processes_come_to_what_one_does(two: list[Seen], number: int) -> None:
    """There are batches in which one of the two has no answers."""
    one = fit(nn.Identity, (), OPTIONS[number])
    first, second = (seen.runs[number] for seen in two)
    assert first.train_loss == pytest.approx(one.train_loss, abs=1e-6)
    assert first.val_loss == pytest.approx(one.val_loss, abs=1e-6)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(first.weights[name], tensor, atol=1e-6, rtol=0)
    torch.testing.assert_close(first.logits, one.logits, atol=1e-5, rtol=0)
    assert first.best_epoch == one.best_epoch
    assert first.train_loss == second.train_loss
    assert torch.equal(first.logits, second.logits)


def test_there_are_batches_in_which_a_process_has_no_answers() -> None:
    """What the test above relies on."""
    images, _, answers = data(45)
    loaders = [CrowdLoader(images, answers, 8, 0, True, CPU, Processes(index, 2)) for index in range(2)]
    assert any(
        {len(a.label) > 0, len(b.label) > 0} == {True, False}
        for epoch in range(3)
        for a, b in zip(*(loader.batches(epoch) for loader in loaders), strict=True)
    )


def test_batch_norms_statistics_agree_on_all_processes(two: list[Seen]) -> None:
    first, second = (seen.with_batch_norm for seen in two)
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in second.weights.items())
    assert torch.equal(first.logits, second.logits)
    assert first.best_epoch == second.best_epoch


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_shares_of_a_batch_make_the_batch(count: int) -> None:
    images, _, answers = data(45)
    whole = CrowdLoader(images, answers, 8, 0, True, CPU)
    shares = [CrowdLoader(images, answers, 8, 0, True, CPU, Processes(index, count)) for index in range(count)]
    for batch, *parts in zip(whole.batches(1), *(share.batches(1) for share in shares), strict=True):
        torch.testing.assert_close(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.label for part in parts]), batch.label)
        assert {(part.n_tasks, part.n_answers) for part in parts} == {(len(batch.images), len(batch.label))}
        assert max(len(part.images) for part in parts) - min(len(part.images) for part in parts) <= 1


def test_an_epoch_goes_on_from_a_step() -> None:
    images, _, answers = data(45)
    loader = CrowdLoader(images, answers, 8, 0, True, CPU)
    whole, rest = list(loader.batches(2)), list(loader.batches(2, 4))
    assert len(rest) == len(whole) - 4
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], rest, strict=True))


def test_more_processes_than_tasks_in_a_step_are_refused() -> None:
    images, _, answers = data(45)
    with pytest.raises(SettingsError, match=r"BATCH_SIZE: must have a task for each of 9 processes .* got 8 for 45"):
        CrowdLoader(images, answers, 8, 0, False, CPU, Processes(0, 9))


def test_processes_agree_and_gather_in_order(two: list[Seen]) -> None:
    for seen in two:
        assert seen.flags == [True, True, False]
        assert seen.rows.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]


def test_processes_hear_what_each_says_in_a_line(two: list[Seen]) -> None:
    assert [seen.texts for seen in two] == [["process 0 ", "process 1 é"]] * 2


def test_nodes_that_do_not_train_the_same_are_refused(two: list[Seen]) -> None:
    for seen in two:
        same, settings, data = seen.differences
        assert same == ""
        assert settings == "78 LR: must be the same on all nodes, is 0.1 for process 0 and 0.2 for process 1"
        assert data == "74 the data must be the same on all nodes, process 1 has read others than process 0"


def test_processes_that_may_run_on_the_same_cpus_share_them(two: list[Seen]) -> None:
    assert [seen.cpus for seen in two] == [max(cpus() // 2, 1)] * 2


def test_a_gradient_has_the_strides_of_its_weight(two: list[Seen]) -> None:
    """Or DDP would copy it, and say so."""
    assert [seen.strides for seen in two] == [(49, 49, 7, 1)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_batch_norm_over_processes_needs_gpus(two: list[Seen]) -> None:
    assert {seen.refusal for seen in two} == {"SYNC_BATCHNORM: true needs GPUs, there is none"}
