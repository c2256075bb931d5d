"""The crowd layer against plain NumPy in double precision, and against peerannot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from crowdlayer.crowd_layer import CrowdLayer, CrowdLoss, CrowdModel, posterior

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
    loss = CrowdLoss("answer")(ours(x, task, worker), dense[task, worker], n_tasks)
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


def test_the_identity_penalty_is_the_squared_distance_from_the_start() -> None:
    layer = CrowdLayer(2, 3)
    assert layer.penalty().item() == 0
    with torch.no_grad():
        layer.confusion[1, 0, 2] += 2
        layer.confusion[0, 1, 1] -= 1
    assert layer.penalty().item() == pytest.approx(5)


def test_the_posterior_is_bayes_rule() -> None:
    rng = np.random.default_rng(1)
    z, matrices = rng.normal(size=(3, 4)), rng.normal(size=(2, 4, 4))
    answers = [(0, 0, 1), (0, 1, 2), (2, 1, 3)]
    expected = softmax(z)
    for i, j, y in answers:
        expected[i] *= softmax(matrices[j])[:, y]
    expected /= expected.sum(1, keepdims=True)
    task, worker, label = torch.tensor(answers).T
    likelihood = CrowdLayer.of(torch.from_numpy(matrices)).answer_log_likelihood()
    got = posterior(torch.from_numpy(z), likelihood, task, worker, label)
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-12)
