"""The crowd layer against plain NumPy in double precision, and against peerannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from crowdlayer.learning.crowd_layer import WORKER_MODELS, CrowdLayer, Stochastic, WorkerModel, log_likelihood
from crowdlayer.learning.crowd_model import CrowdLoss, CrowdModel
from crowdlayer.learning.regularizers import Regularizer
from crowdlayer.machine.processes import Processes

Floats = npt.NDArray[np.float64]


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    result: Floats = e / e.sum(-1, keepdims=True)
    return result


def reference(z: Floats, confusion: Floats, answers: list[tuple[int, int, int]]) -> tuple[float, Floats, Floats]:
    """L and its gradients by z and by the matrices, answer by answer, as the paper writes it.

    π^(j) is the transpose of confusion[j]; h = σ(π σ(z)); L = 1/n_task Σ CE(h, y).
    """
    n_tasks = len(z)
    loss, by_z, by_confusion = 0.0, np.zeros_like(z), np.zeros_like(confusion)
    for i, j, y in answers:
        p = softmax(z[i])
        pi = confusion[j].T
        h = softmax(pi @ p)
        loss -= np.log(h[y]) / n_tasks
        by_scores = (h - np.eye(len(p))[y]) / n_tasks
        by_confusion[j] += np.outer(by_scores, p).T
        by_p = pi.T @ by_scores
        by_z[i] += p * (by_p - by_p @ p)
    return loss, by_z, by_confusion


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 5), st.integers(2, 6), st.integers(1, 20))
def test_loss_and_gradients_are_the_papers_to_1e10(
    seed: int, n_tasks: int, n_workers: int, n_classes: int, n_answers: int
) -> None:
    rng = np.random.default_rng(seed)
    z, matrices = rng.normal(0, 3, (n_tasks, n_classes)), rng.normal(0, 2, (n_workers, n_classes, n_classes))
    answers = [
        (int(rng.integers(n_tasks)), int(rng.integers(n_workers)), int(rng.integers(n_classes)))
        for _ in range(n_answers)
    ]
    layer = CrowdLayer.of(torch.from_numpy(matrices.copy()))
    logits = torch.from_numpy(z.copy()).requires_grad_()
    task, worker, label = torch.tensor(answers).T
    loss = CrowdLoss("task")(layer(logits, task, worker), label, n_tasks)
    loss.backward()
    expected, by_z, by_confusion = reference(z, matrices, answers)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert logits.grad is not None
    assert layer.confusion.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), by_z, rtol=0, atol=1e-10)
    np.testing.assert_allclose(layer.confusion.grad.numpy(), by_confusion, rtol=0, atol=1e-10)


def explained(name: str, tables: dict[str, Floats], z: Floats, answers: list[tuple[int, int, int]]) -> float:
    """L of each worker model, answer by answer, as its authors write it."""
    loss = 0.0
    for i, j, y in answers:
        p = softmax(z[i])
        match name:
            case "matrix":
                h = softmax(tables["confusion"][j].T @ p)
            case "scale":
                h = softmax(tables["scale"][j] * p)
            case "bias":
                h = softmax(p + tables["bias"][j])
            case "scale+bias":
                h = softmax(tables["scale"][j] * p + tables["bias"][j])
            case "scalar":
                h = softmax(tables["scalar"][j] * p)
            case "stochastic":
                h = softmax(tables["weight"][j]).T @ p
        loss -= np.log(h[y]) / len(z)
    return loss


def slopes(loss: Callable[[], float], x: Floats) -> Floats:
    """The derivative of `loss` by each entry of `x`, by central differences in place."""
    result = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        kept, step = x[at], 1e-5
        x[at] = kept + step
        above = loss()
        x[at] = kept - step
        result[at] = (above - loss()) / (2 * step)
        x[at] = kept
    return result


def drawn(name: str, n_workers: int, n_classes: int, rng: np.random.Generator) -> tuple[WorkerModel, dict[str, Floats]]:
    """A worker model in double precision with random tables, and these."""
    layer = WORKER_MODELS[name](n_workers, n_classes).double()
    tables = {key: rng.normal(0, 1.5, tuple(table.shape)) for key, table in layer.named_parameters()}
    layer.load_state_dict({key: torch.from_numpy(table) for key, table in tables.items()})
    return layer, tables


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("name", WORKER_MODELS)
def test_every_worker_model_and_its_gradients_are_numpys(name: str, n_classes: int) -> None:
    rng = np.random.default_rng(3)
    layer, tables = drawn(name, 3, n_classes, rng)
    z = rng.normal(0, 2, (5, n_classes))
    answers = [(int(rng.integers(5)), int(rng.integers(3)), int(rng.integers(n_classes))) for _ in range(9)]
    task, worker, label = torch.tensor(answers).T
    logits = torch.from_numpy(z.copy()).requires_grad_()
    loss = CrowdLoss("task")(layer(logits, task, worker), label, 5)
    loss.backward()

    def expected() -> float:
        return explained(name, tables, z, answers)

    assert loss.item() == pytest.approx(expected(), rel=1e-10)
    for tensor, array in ((logits, z), *((table, tables[key]) for key, table in layer.named_parameters())):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad, slopes(expected, array), atol=1e-8)


@pytest.mark.parametrize("name", WORKER_MODELS)
def test_every_worker_model_has_an_equivalent_matrix(name: str) -> None:
    rng = np.random.default_rng(4)
    layer, _ = drawn(name, 3, 4, rng)
    p = torch.from_numpy(softmax(rng.normal(0, 2, (6, 4))))
    worker = torch.tensor([0, 1, 2, 2, 1, 0])
    mixed = torch.einsum("nt,nta->na", p, layer.matrices()[worker])
    h = mixed.softmax(1) if layer.likelihood == "softmax" else mixed
    torch.testing.assert_close(layer.scores(p, worker).softmax(1), h)
    rows = log_likelihood(layer.matrices(), layer.likelihood).exp().sum(2)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("name", WORKER_MODELS)
def test_every_worker_model_takes_workers_for_right_until_it_learns_otherwise(name: str) -> None:
    layer = WORKER_MODELS[name](2, 5)
    assert layer.answer_log_likelihood().argmax(2).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("name", ["matrix", "stochastic"])
def test_a_matrix_can_start_at_any_confusion(name: str) -> None:
    confusion = torch.tensor(np.random.default_rng(5).dirichlet(np.ones(4), (3, 4)))
    layer = WORKER_MODELS[name](3, 4).double()
    layer.start_at(confusion)
    torch.testing.assert_close(layer.answer_log_likelihood().exp(), confusion)


@pytest.mark.parametrize("name", ["scale", "scale+bias"])
def test_a_scale_can_start_where_errors_are_even(name: str) -> None:
    right = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
    confusion = torch.diag_embed(right - (1 - right) / 2) + ((1 - right) / 2).view(1, 3, 1)
    layer = WORKER_MODELS[name](1, 3).double()
    layer.start_at(confusion)
    torch.testing.assert_close(layer.answer_log_likelihood().exp(), confusion)


def test_a_bias_starts_with_the_answers_that_a_worker_prefers_when_wrong() -> None:
    always_2 = torch.tensor([[[0.3, 0.1, 0.6], [0.1, 0.3, 0.6], [0.1, 0.1, 0.8]]])
    for name in ("bias", "scale+bias"):
        layer = WORKER_MODELS[name](1, 3)
        layer.start_at(always_2)
        assert layer.get_parameter("bias").argmax(1).tolist() == [2]
    better, worse = 0.9, 0.5
    evenly = torch.stack([torch.eye(3) * (right - (1 - right) / 2) + (1 - right) / 2 for right in (better, worse)])
    scalar = WORKER_MODELS["scalar"](2, 3)
    scalar.start_at(evenly)
    torch.testing.assert_close(scalar.answer_log_likelihood().exp(), evenly)


@pytest.mark.parametrize("n_classes", [2, 3, 5, 10])
def test_a_bias_starts_nearer_to_the_workers_than_the_identity(n_classes: int) -> None:
    """Where a worker gives each answer as often as he does."""
    rng = np.random.default_rng(5)
    noise = rng.dirichlet(np.ones(n_classes), (50, n_classes))
    confusion = torch.tensor(0.5 * np.eye(n_classes) + 0.5 * noise)
    layer = WORKER_MODELS["bias"](50, n_classes).double()

    def divergence() -> float:
        return float((confusion * (confusion.log() - layer.answer_log_likelihood().detach())).sum(2).mean())

    from_identity = divergence()
    layer.start_at(confusion)
    shares = layer.answer_log_likelihood().exp().mean(1)
    torch.testing.assert_close(shares, confusion.mean(1), rtol=0, atol=1e-3)
    assert divergence() < from_identity


def test_a_certain_classifier_and_a_certain_worker_give_a_finite_loss() -> None:
    layer = WORKER_MODELS["stochastic"](1, 3)
    with torch.no_grad():
        layer.get_parameter("weight").copy_(200 * torch.eye(3))
    logits = torch.tensor([[300.0, 0, 0]], requires_grad=True)
    loss = CrowdLoss("task")(layer(logits, torch.tensor([0]), torch.tensor([0])), torch.tensor([1]), 1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


class PeerannotNet(nn.Module):
    """What peerannot computes: the scores of all workers for all tasks, answers that are missing marked by -1."""

    def __init__(self, classifier: nn.Module, confusion: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.confusion = nn.Parameter(confusion.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ik,jkl->ijl", self.classifier(x).softmax(1), self.confusion)


def test_with_reduction_answer_loss_and_gradients_are_peerannots() -> None:
    torch.manual_seed(0)
    n_tasks, n_workers, n_classes = 12, 5, 4
    x = torch.randn(n_tasks, 6)
    dense = torch.randint(-1, n_classes, (n_tasks, n_workers))
    dense[0] = -1  # a task without answers
    ours = CrowdModel(nn.Linear(6, n_classes), CrowdLayer(n_workers, n_classes))
    with torch.no_grad():
        ours.confusion.add_(0.3 * torch.randn_like(ours.confusion))
    classifier = nn.Linear(6, n_classes)
    classifier.load_state_dict(ours.classifier.state_dict())
    theirs = PeerannotNet(classifier, ours.confusion.detach())
    expected = F.cross_entropy(theirs(x).reshape(-1, n_classes), dense.view(-1), ignore_index=-1, reduction="mean")
    torch.autograd.backward(expected)

    task, worker = torch.nonzero(dense >= 0, as_tuple=True)
    loss = CrowdLoss("answer")(ours(x, task, worker)[1], dense[task, worker], n_tasks)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(ours.confusion.grad, theirs.confusion.grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.classifier.weight.grad, classifier.weight.grad, rtol=0, atol=1e-6)


def test_the_layer_starts_at_the_identity() -> None:
    layer = CrowdLayer(3, 4)
    assert layer.confusion.shape == (3, 4, 4)
    logits = torch.randn(2, 4)
    scores = layer(logits, torch.tensor([0, 1]), torch.tensor([2, 0]))
    torch.testing.assert_close(scores, logits.softmax(1))


def test_confusion_is_indexed_by_worker_true_class_answered_class() -> None:
    layer = CrowdLayer(1, 3)
    with torch.no_grad():
        layer.confusion[0, 0] = torch.tensor([0.0, 5.0, 0.0])  # takes class 0 for class 1
    scores = layer(torch.tensor([[50.0, 0, 0]]), torch.tensor([0]), torch.tensor([0]))
    assert scores.argmax(1).tolist() == [1]


def test_a_batch_without_answers_has_no_loss_and_no_nan() -> None:
    layer = CrowdLayer(2, 3)
    logits = torch.randn(4, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    for reduction in ("task", "answer"):
        loss = CrowdLoss(reduction)(layer(logits, none, none), none, 4)
        loss.backward()
        assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_scores_stay_float32_under_autocast() -> None:
    layer = CrowdLayer(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("regularizer", ["trace", "geo-w"])
def test_a_worker_who_is_as_good_as_certain_has_a_gradient(regularizer: Literal["trace", "geo-w"]) -> None:
    """Where a probability has come to 0 in float32."""
    model = Stochastic(2, 3)
    with torch.no_grad():
        model.weight[0, 0] = torch.tensor([110.0, 0.0, -1.0])
    torch.autograd.backward(Regularizer(regularizer, model, torch.ones(2), Processes())(model, torch.zeros(1, 3)))
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()
