"""Figures against torchmetrics and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from crowdlayer.learning import metrics


def sample(seed: int, n: int, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    logits = torch.randn(n, n_classes, generator=generator) * 3
    logits[torch.arange(n), labels] += torch.rand(n, generator=generator) * 4
    return logits, labels


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(5, 200), st.integers(2, 12))
def test_accuracy_top_k_and_ece_agree_with_torchmetrics(seed: int, n: int, n_classes: int) -> None:
    logits, labels = sample(seed, n, n_classes)
    assert metrics.accuracy(logits.argmax(1), labels) == pytest.approx(
        100 * float(multiclass_accuracy(logits, labels, n_classes, average="micro")), abs=1e-4
    )
    for k in (2, min(5, n_classes)):
        micro, macro = metrics.top_k(logits, labels, k)
        by_micro = multiclass_accuracy(logits, labels, n_classes, top_k=k, average="micro")
        by_macro = multiclass_accuracy(logits, labels, n_classes, top_k=k, average="macro")
        assert micro == pytest.approx(100 * float(by_micro), abs=1e-3)
        assert macro == pytest.approx(100 * float(by_macro), abs=1e-3)
    ece = multiclass_calibration_error(logits.softmax(1), labels, n_classes, n_bins=15, norm="l1")
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(float(ece), abs=1e-5)


def test_accuracy_loss_and_top_k_agree_with_scikit_learn() -> None:
    logits, labels = sample(3, 500, 9)
    assert metrics.accuracy(logits.argmax(1), labels) == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
    assert metrics.cross_entropy(logits, labels) == pytest.approx(
        log_loss(labels, logits.double().softmax(1), labels=range(9))
    )
    assert metrics.top_k(logits, labels, 2)[0] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=2))


def test_a_class_missing_from_the_labels_does_not_count_in_macro() -> None:
    logits = torch.eye(4)[:3] * 9
    assert metrics.top_k(logits, torch.tensor([0, 1, 3]), 1)[1] == pytest.approx(100 * 2 / 3)


def test_certain_and_right_is_perfectly_calibrated() -> None:
    logits = torch.eye(3)[[0, 1, 2, 1]] * 100
    assert metrics.expected_calibration_error(logits, torch.tensor([0, 1, 2, 1])) == pytest.approx(0, abs=1e-9)
    assert metrics.expected_calibration_error(logits, torch.tensor([1, 2, 0, 0])) == pytest.approx(1)


def test_top_k_figures_exist_from_eight_classes_on() -> None:
    assert "val_micro_top2" not in metrics.evaluation(*sample(0, 20, 7), "val")
    assert {f"val_{mean}_top{k}" for mean in ("micro", "macro") for k in (2, 5)} <= set(
        metrics.evaluation(*sample(0, 20, 8), "val")
    )


def test_the_calibrated_loss_is_the_least_over_temperatures() -> None:
    logits, labels = sample(5, 400, 5)
    at = np.array([metrics.cross_entropy(4 * logits / t, labels) for t in np.geomspace(0.05, 20, 4000)])
    best = metrics.calibrated(lambda temperature: metrics.cross_entropy(4 * logits / temperature, labels))
    assert best == pytest.approx(at.min(), abs=1e-5)
    assert best <= metrics.cross_entropy(4 * logits, labels)


def test_an_infinite_logit_does_not_make_the_figures_nan() -> None:
    logits = torch.tensor([[0.0, 1e30], [1e30, 0.0]])
    assert math.isfinite(metrics.cross_entropy(logits, torch.tensor([1, 0])))
    assert metrics.accuracy(logits.argmax(1), torch.tensor([1, 0])) == 100


def test_brier_and_the_reliability_diagram_agree_with_scikit_learn() -> None:
    logits, labels = sample(4, 600, 2)
    probability = logits.double().softmax(1)
    assert metrics.brier(logits, labels) == pytest.approx(2 * brier_score_loss(labels, probability[:, 1]))
    bins = metrics.reliability_bins(logits, labels)
    confidence, predicted = probability.max(1)
    hit, mean = calibration_curve(predicted == labels, confidence, n_bins=15)
    assert [found["accuracy"] for found in bins] == pytest.approx(hit.tolist())
    assert [found["confidence"] for found in bins] == pytest.approx(mean.tolist())
    weighted = sum(found["count"] * abs(found["accuracy"] - found["confidence"]) for found in bins)
    assert weighted / 600 == pytest.approx(metrics.expected_calibration_error(logits, labels))


@pytest.mark.parametrize("factor", [0.3, 1.0, 5.0])
def test_the_temperature_undoes_a_factor_of_the_logits(factor: float) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(5, size=4000)
    images = rng.standard_normal((4000, 5))
    images[np.arange(4000), truth] += 2
    logits, labels = torch.from_numpy(factor * 2 * images), torch.from_numpy(truth)  # calibrated but for the factor
    found = metrics.best_temperature(lambda t: metrics.cross_entropy(logits / t, labels))
    assert found == pytest.approx(factor, rel=0.1)
    assert metrics.expected_calibration_error(logits / found, labels) < 0.02


def test_a_few_images_that_are_all_right_do_not_make_the_classifier_certain() -> None:
    """The likeliest temperature is then 0, and the first wrong image of the world would cost everything."""
    logits = 2 * torch.eye(3, dtype=torch.float64).repeat(4, 1)
    labels = logits.argmax(1)

    def loss(temperature: float) -> float:
        return metrics.cross_entropy(logits / temperature, labels)

    assert metrics.best_temperature(loss) < 0.06
    assert 0.3 < metrics.fitted_temperature(loss, len(labels)) < 1
    assert metrics.fitted_temperature(loss, 10**9) < 0.1  # against many the one observation weighs nothing


def test_the_confusion_matrix_has_the_truth_in_its_rows() -> None:
    predicted, labels = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 2])
    assert metrics.confusion_matrix(predicted, labels, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
