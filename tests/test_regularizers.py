"""The regularisers against NumPy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from crowdlayer.learning.crowd_layer import WORKER_MODELS, CrowdLayer, WorkerModel
from crowdlayer.learning.regularizers import RIDGE, Name, Regularizer
from crowdlayer.machine.processes import Processes
from tests.gang import together
from tests.test_crowd_layer import Floats, slopes, softmax

ANSWERS_OF = torch.tensor([1, 8, 3])


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
    regularizer = Regularizer(name, CrowdLayer(3, 4).double(), ANSWERS_OF, Processes())
    layer = CrowdLayer.of(torch.from_numpy(confusion.copy()))
    logits = torch.from_numpy(z.copy()).requires_grad_()
    term = regularizer(layer, logits)
    torch.autograd.backward(term)
    assert term.item() == pytest.approx(expected(name, confusion, z), rel=1e-10)
    for tensor, array in ((logits, z), (layer.confusion, confusion)):
        got = np.zeros_like(array) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(got, slopes(lambda: expected(name, confusion, z), array), atol=1e-7)


def test_the_workers_volume_is_exact_where_all_rows_are_nearly_the_same() -> None:
    rng = np.random.default_rng(0)
    confusion = torch.from_numpy(rng.normal(size=10) + rng.normal(0, 1e-3, (100, 10, 10))).float()
    terms, gradients = [], []
    for layer in (CrowdLayer.of(confusion), CrowdLayer.of(confusion.double())):
        term = Regularizer("geo-w", layer, torch.ones(100), Processes())(layer, torch.zeros(1, 10))
        torch.autograd.backward(term)
        assert layer.confusion.grad is not None
        terms.append(term.item())
        gradients.append(layer.confusion.grad.double())
    assert terms[0] == pytest.approx(terms[1], rel=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def volume(logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    """geo-f of this process's share of `logits`, and its gradient by them."""
    processes = Processes.joined()
    share = processes.mine(logits).clone().requires_grad_()
    term = Regularizer("geo-f", CrowdLayer(3, 3), ANSWERS_OF, processes)(CrowdLayer(3, 3), share)
    torch.autograd.backward(term)
    assert share.grad is not None
    return term.item(), share.grad


def test_the_classifiers_volume_is_that_of_all_processes_and_so_is_the_mean_gradient() -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 3)))
    alone, gradient = volume(logits)
    shares = together(2, volume, logits)
    assert [value for value, _ in shares] == pytest.approx([alone, alone])
    torch.testing.assert_close(torch.cat([part for _, part in shares]) / 2, gradient)


def test_fewer_images_than_classes_have_a_finite_volume() -> None:
    logits = torch.randn(2, 10, requires_grad=True)
    term = Regularizer("geo-f", CrowdLayer(3, 10), ANSWERS_OF, Processes())(CrowdLayer(3, 10), logits)
    torch.autograd.backward(term)
    assert term.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("model", WORKER_MODELS)
@pytest.mark.parametrize("name", get_args(Name))
def test_every_worker_model_can_be_regularised(name: Name, model: str) -> None:
    torch.manual_seed(0)
    layer: WorkerModel = WORKER_MODELS[model](3, 4).double()
    regularizer = Regularizer(name, layer, ANSWERS_OF, Processes())
    with torch.no_grad():
        for table in layer.parameters():
            table.add_(0.1 * torch.randn_like(table))
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    before = regularizer(layer, logits)
    torch.autograd.backward(before)
    with torch.no_grad():
        for tensor in (logits, *layer.parameters()):
            if tensor.grad is not None:
                tensor -= 1e-3 * tensor.grad
    assert regularizer(layer, logits) < before
    assert name != "identity" or Regularizer(name, layer, ANSWERS_OF, Processes())(layer, logits) == 0
