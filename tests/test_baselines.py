"""BASELINES: what the same network makes of aggregated labels, in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from crowdlayer import job
from crowdlayer.answers import Answers
from crowdlayer.errors import DeviceMemoryError
from crowdlayer.learning import baselines
from crowdlayer.learning.baselines import aggregated, gain
from crowdlayer.settings import load_settings
from tests.conftest import QUICK, variables
from tests.crowds import write_shapes


def test_labels_are_aggregated_by_name() -> None:
    """Three who agree and one who always says the next class: dawid-skene learns to read him, majority cannot."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    task = np.repeat(np.arange(300), 2)
    worker = np.array([[rng.integers(3), 3] for _ in range(300)]).ravel()
    label = np.where(worker == 3, (truth[task] + 1) % 3, truth[task])
    answers = Answers(300, 4, task, worker, label)
    right = {name: float((aggregated(name, answers, 3) == truth).mean()) for name in ("majority", "dawid-skene")}
    assert right["dawid-skene"] > right["majority"] + 0.2


@pytest.mark.parametrize(
    ("n", "won", "lost"), [(20, 0.1, 0.05), (100, 0.02, 0.0), (200, 0.02, 0.01), (400, 0.24, 0.14)]
)
def test_the_interval_of_the_gain_covers_the_true_difference(n: int, won: float, lost: float) -> None:
    """Of few images, and of two that hardly differ, too; `won` and `lost` are right by one of them alone."""
    rng = np.random.default_rng(0)
    labels, found = torch.zeros(n, dtype=torch.int64), []
    for _ in range(400):
        kind = rng.choice(4, size=n, p=[won, lost, 0.5, 0.5 - won - lost])
        ours, theirs = (F.one_hot(torch.from_numpy(~np.isin(kind, own) * 1), 2).float() for own in ((0, 2), (1, 2)))
        found.append(gain(ours, theirs, labels))
    assert np.mean([one["low"] <= 100 * (won - lost) <= one["high"] for one in found]) >= 0.94
    assert np.mean([one["points"] for one in found]) == pytest.approx(100 * (won - lost), abs=1)


def test_the_interval_of_the_gain_is_bonetts_and_prices() -> None:
    """By hand for 10 images of which one alone has 3 right, the other 1: 4/12 - 2/12 ± 1.96 √((6/12 - 1/36) / 12)."""
    right = [[0] * 3 + [1] + [0] * 6, [1] * 3 + [0] + [0] * 6]
    ours, theirs = (F.one_hot(torch.tensor(row), 2).float() for row in right)
    found = gain(ours, theirs, torch.zeros(10, dtype=torch.int64))
    assert list(found.values()) == pytest.approx([20, -22.2144, 55.5478], abs=1e-3)
    alike = gain(ours[:1], ours[:1], torch.zeros(1, dtype=torch.int64))
    assert alike == {"points": 0, "low": pytest.approx(-92.3953, abs=1e-3), "high": pytest.approx(92.3953, abs=1e-3)}


def run(tasks: Path, **settings: str) -> dict[str, Any]:
    """Train in this process; the results."""
    with variables(**(QUICK | {"TASKS": str(tasks), "BASELINES": "majority,dawid-skene"} | settings)):
        location = job.train(load_settings())
    results: dict[str, Any] = json.loads(Path(location).read_text())
    return results


FIGURES = {"label_accuracy", "best_epoch", "val_accuracy", "test_loss", "test_accuracy", "test_ece", "gain"}


def test_the_results_hold_each_baselines_figures_and_are_else_the_same(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data")
    results = run(data, OUTPUT=str(tmp_path / "with"))
    assert set(results["baselines"]) == {"majority", "dawid-skene"}
    for figures in results["baselines"].values():
        assert set(figures) == FIGURES
        assert figures["gain"]["points"] == pytest.approx(results["test_accuracy"] - figures["test_accuracy"])
        assert figures["label_accuracy"] > 60
    assert results["baselines"]["majority"]["label_accuracy"] == pytest.approx(results["majority_vote_accuracy"])

    without = run(data, OUTPUT=str(tmp_path / "without"), BASELINES="")
    assert without["baselines"] == {}
    assert {k: v for k, v in results.items() if k not in ("job", "baselines")} == {
        k: v for k, v in without.items() if k not in ("job", "baselines")
    }


def test_without_true_labels_a_baseline_is_chosen_on_aggregated_ones(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", n_val=0, n_test=0)
    figures = run(data, BASELINES="majority")["baselines"]["majority"]
    assert figures["best_epoch"] in (1, 2)
    assert [figures[name] for name in ("val_accuracy", "test_accuracy", "gain")] == [None] * 3


def test_a_frozen_network_sees_each_image_once_for_all_of_them(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", n_train=24, n_val=8, n_test=10)
    seen: list[int] = []

    def count(module: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and not given[0].is_meta:
            seen.append(len(given[0]))

    with register_module_forward_hook(count):
        results = run(data, FREEZE="true")
    assert set(results["baselines"]) == {"majority", "dawid-skene"}
    assert sum(seen) == 24 + 8 + 3 * (10 + 2)  # each tests for itself, and asks whether the head is last


def test_every_line_of_a_baseline_says_whose_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "crowdlayer")
    run(write_shapes(tmp_path / "data"), BASELINES="majority")
    epochs = [record for record in caplog.records if "epoch" in vars(record)]
    whose = [(record.getMessage().partition("epoch")[0], vars(record).get("baseline")) for record in epochs]
    assert whose == [("", None)] * 2 + [("baseline majority: ", "majority")] * 2
    assert caplog.messages[-1].startswith("results at ")


def test_a_baseline_that_does_not_fit_into_memory_does_not_cost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(*args: object) -> None:
        raise DeviceMemoryError("out of memory with MODEL=resnet18")

    monkeypatch.setattr(baselines, "on_features", too_large)
    results = run(write_shapes(tmp_path / "data"), BASELINES="majority")
    assert results["baselines"] == {"majority": None}
    assert "baseline majority: left out: out of memory" in caplog.text


def test_answers_that_memory_cannot_aggregate_do_not_cost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(*args: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(baselines, "dawid_skene", too_large)
    results = run(write_shapes(tmp_path / "data"), BASELINES="dawid-skene")
    assert results["baselines"] == {"dawid-skene": None}
    assert "baseline dawid-skene: left out: out of memory with matrices of 4 workers" in caplog.text


def test_a_baseline_that_diverges_does_not_cost_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The crowd layer's loss has small gradients, whatever the logits; that of labels has not."""
    data = write_shapes(tmp_path / "data")
    results = run(data, BASELINES="majority", MODEL="squeezenet1_1", IMG_SIZE="32", LR="1", GUARD="false")
    assert results["baselines"] == {"majority": None}
    (left_out,) = (line for line in caplog.messages if line.startswith("baseline majority: left out: "))
    assert left_out.endswith(": lower LR=1")
