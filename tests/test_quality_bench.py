"""The bench of quality pairs what belongs together, and goes on where it was stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crowdlayer.answers import Answers
from crowdlayer.settings import PREFIX
from tests.bench import quality, quality_tables
from tests.bench.crowds import Pool, answered, at_most, frequencies, share, unlike
from tests.bench.quality_variants import BUDGET, CONDITIONS, RECOMMENDED, VARIANTS, Condition
from tests.conftest import ROOT


def pool(n: int = 60) -> Pool:
    """Images that are their own number."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=n)
    numbered = torch.arange(n).view(n, 1, 1, 1).expand(n, 8, 8, 3).to(torch.uint8)
    answers = answered(truth, 3, "spammers", rng)
    return Pool(3, numbered, truth, answers, numbered[:30] + 100, truth[:30])


def numbers(images: torch.Tensor) -> set[int]:
    return set(images[:, 0, 0, 0].tolist())


def test_a_pair_shares_out_all_images_and_none_twice() -> None:
    whole = pool()
    held: set[int] = set()
    for fold in range(5):
        part = share(whole, 1, fold, 5, None, None)
        assert numbers(part.train).isdisjoint(numbers(part.held))
        assert numbers(part.val).isdisjoint(numbers(part.test))
        assert len(numbers(part.train) | numbers(part.held)) == 60
        assert part.answers.n_tasks == len(part.train) == len(part.truth) == 48
        held |= numbers(part.held)
    assert held == set(range(60))
    again = share(whole, 1, 4, 5, None, None)
    assert torch.equal(again.train, part.train)


def test_of_several_answers_some_are_drawn_for_every_task() -> None:
    whole = pool()
    one = at_most(whole.answers, 1, np.random.default_rng(0))
    assert one.task.tolist() == list(range(60))
    every = set(zip(whole.answers.task, whole.answers.worker, whole.answers.label, strict=True))
    assert set(zip(one.task, one.worker, one.label, strict=True)) <= every


def test_simulated_answers_follow_the_crowds_matrices() -> None:
    truth = np.repeat(np.arange(4), 2000)
    answers = answered(truth, 4, "pairs", np.random.default_rng(0))
    for true, most, other in ((0, 0, 1), (1, 1, 1), (2, 2, 3)):
        shares = np.bincount(answers.label[truth[answers.task] == true], minlength=4) / 6000
        assert shares[most] + shares[other] * (most != other) == pytest.approx(0.97, abs=0.02)


def test_of_unlike_classes_the_tasks_are_unlike_and_the_test_is_not() -> None:
    whole = pool(240)
    rare = unlike(whole, np.random.default_rng(0))
    assert np.bincount(rare.truth, minlength=3) / len(rare.truth) == pytest.approx(frequencies(3), abs=0.02)
    assert whole.truth[rare.crowd[:, 0, 0, 0].numpy()].tolist() == rare.truth.tolist()
    assert rare.answers.n_tasks == len(rare.truth)
    assert torch.equal(rare.labelled, whole.labelled)


def line(variant: str, fold: int, accuracies: list[float], losses: list[float]) -> dict[str, object]:
    seen = dict.fromkeys(("test_loss", "test_ece", "val_calibrated", "held_loss", "held_calibrated"), losses)
    more = {"test_accuracy": accuracies, "val_loss": losses, "val_accuracy": accuracies, "held_agreement": accuracies}
    seen["test_scaled_ece"] = losses
    gaps = {"test_scaled_gaps": [[3.0 if fold else -1.0, 1.0]] * 2, "n_test": 10}
    return {"condition": "labelme", "model": "small", "variant": variant, "seed": 0, "fold": fold} | seen | more | gaps


def test_gains_are_paired_and_each_rule_picks_its_epoch() -> None:
    lines = [
        line("majority", 0, [50, 60], [1, 2]),
        line("majority", 1, [70, 80], [1, 2]),
        line("matrix", 0, [51, 63], [1, 2]),
        line("matrix", 1, [71, 85], [1, 2]),
        line("matrix", 2, [0, 0], [1, 2]),  # without its partner
    ]
    rows = {row["rule"]: row for row in quality_tables.summarise(lines, "majority") if row["variant"] == "matrix"}
    assert rows["loss"]["n"] == 2
    assert rows["loss"]["gain"] == 1
    assert rows["loss"]["gain_half_interval"] == 0
    assert rows["last"]["gain"] == 4
    assert rows["last"]["gain_half_interval"] == pytest.approx(12.706, abs=1e-3)  # t of one degree of freedom
    assert rows["accuracy"]["epoch"] == 2
    assert (
        rows["loss"]["pooled_scaled_ece"] == 0.2
    )  # (|3 − 1| + |1 + 1|) / 20: what falls either way is no miscalibration


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "pool_of", lambda condition, seed: pool())
    monkeypatch.setitem(CONDITIONS, "labelme", Condition("labelme", 8, budget={"n_epochs": 1}))
    out = tmp_path / "runs.jsonl"
    arguments = ["run", "labelme", "--out", str(out), "--seeds", "1", "--folds", "2", "--variants", "truth", "matrix"]
    quality.main(arguments)
    whole = out.read_text().splitlines()
    assert len(whole) == 4
    out.write_text("\n".join(whole[:2]) + "\n" + whole[2][:50])  # the last line was cut off
    quality.main(arguments)
    again = [json.loads(text) for text in out.read_text().splitlines()]
    assert [(one["variant"], one["fold"]) for one in again] == [(v, f) for f in (0, 1) for v in ("truth", "matrix")]
    assert all(
        one["test_accuracy"] == json.loads(text)["test_accuracy"] for one, text in zip(again, whole, strict=True)
    )


def test_the_recommended_settings_are_those_that_were_measured() -> None:
    text = (ROOT / "crowdlayer" / "docs" / "quality.md").read_text()
    block = dict(re.findall(rf"^{PREFIX}(\w+)=(\S+)", text, re.MULTILINE))
    measured = BUDGET | VARIANTS[RECOMMENDED] | {"select_by": "last"}
    budget = ("n_epochs", "batch_size")  # as large as the data set wants
    assert block == {name.upper(): str(value) for name, value in measured.items() if name not in budget}


def test_an_interval_is_students() -> None:
    mean, half = quality_tables.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_no_answers_are_no_trouble() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert len(at_most(Answers(3, 2, none, none, none), 1, np.random.default_rng(0))) == 0
