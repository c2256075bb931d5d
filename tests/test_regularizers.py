"""The regularisers against NumPy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from crowdlayer.crowd_layer import WORKER_MODELS, CrowdLayer, WorkerModel
from crowdlayer.regularizers import RIDGE, Name, Regularizer, Total
from tests.test_crowd_layer import Floats, slopes, softmax

ANSWERS_OF = torch.tensor([1, 8, 3])


def alone(share: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return share


def log_det(gram: Floats) -> float:
    return float(np.linalg.slogdet(gram + RIDGE * np.eye(len(gram)))[1])


def expected(name: str, confusion: Floats, z: Floats) -> float:
    """The term for a layer of matrices that started at the identity, workers one after another."""
    likelihood = softmax(confusion)
    n_workers, n_classes, _ = confusion.shape
    answers = ANSWERS_OF.numpy()
    match name:
        case "identity":
            return float(sum(((m - np.eye(n_classes)) ** 2).sum() for m in confusion))
        case "pooled":
            crowd = sum(n * m for n, m in zip(answers, confusion, strict=True)) / answers.sum()
            mean = answers.mean()
            pairs = zip(answers, confusion, strict=True)
            return float(sum(mean / (mean + n) * ((m - crowd) ** 2).sum() for n, m in pairs))
        case "trace":
            return float(sum(np.trace(a) for a in likelihood) / n_workers)
        case "geo-w":
            return -log_det(sum((a @ a.T for a in likelihood), np.zeros((n_classes, n_classes))) / n_workers)
        case _:
            p = softmax(z)
            return -log_det(p.T @ p / len(p))


@pytest.mark.parametrize("name", get_args(Name))
def test_a_regulariser_and_its_gradients_are_numpys(name: Name) -> None:
    rng = np.random.default_rng(0)
    confusion, z = rng.normal(0, 1, (3, 4, 4)), rng.normal(0, 1, (6, 4))
    regularizer = Regularizer(name, CrowdLayer(3, 4).double(), ANSWERS_OF)
    layer = CrowdLayer.of(torch.from_numpy(confusion.copy()))
    logits = torch.from_numpy(z.copy()).requires_grad_()
    term = regularizer(layer, logits, alone)
    torch.autograd.backward(term)
    assert term.item() == pytest.approx(expected(name, confusion, z), rel=1e-10)
    for tensor, array in ((logits, z), (layer.confusion, confusion)):
        got = np.zeros_like(array) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(got, slopes(lambda: expected(name, confusion, z), array), atol=1e-7)


def test_the_classifiers_volume_is_that_of_all_processes_and_so_is_its_gradient() -> None:
    logits = torch.randn(8, 3, dtype=torch.float64)
    regularizer = Regularizer("geo-f", CrowdLayer(3, 3), ANSWERS_OF)

    def value_and_gradient(share: torch.Tensor, total: Total) -> tuple[float, torch.Tensor]:
        own = share.clone().requires_grad_()
        term = regularizer(CrowdLayer(3, 3), own, total)
        torch.autograd.backward(term)
        assert own.grad is not None
        return term.item(), own.grad

    whole, gradient = value_and_gradient(logits, alone)
    p = logits.softmax(1)

    def sum_of_all(share: torch.Tensor) -> torch.Tensor:
        return p.T @ p if share.dim() else torch.tensor(8)

    for rows in (slice(0, 3), slice(3, 8)):
        value, part = value_and_gradient(logits[rows], sum_of_all)
        assert value == pytest.approx(whole)
        torch.testing.assert_close(part, gradient[rows])


def test_fewer_images_than_classes_have_a_finite_volume() -> None:
    logits = torch.randn(2, 10, requires_grad=True)
    term = Regularizer("geo-f", CrowdLayer(3, 10), ANSWERS_OF)(CrowdLayer(3, 10), logits, alone)
    torch.autograd.backward(term)
    assert term.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("model", WORKER_MODELS)
@pytest.mark.parametrize("name", get_args(Name))
def test_every_worker_model_can_be_regularised(name: Name, model: str) -> None:
    layer: WorkerModel = WORKER_MODELS[model](3, 4)
    regularizer = Regularizer(name, layer, ANSWERS_OF)
    with torch.no_grad():
        for table in layer.parameters():
            table.add_(0.1 * torch.randn_like(table))
    logits = torch.randn(6, 4, requires_grad=True)
    before = regularizer(layer, logits, alone)
    torch.autograd.backward(before)
    with torch.no_grad():
        for tensor in (logits, *layer.parameters()):
            if tensor.grad is not None:
                tensor -= 1e-3 * tensor.grad
    assert regularizer(layer, logits, alone) < before
    assert name != "identity" or Regularizer(name, layer, ANSWERS_OF)(layer, logits, alone) == 0
