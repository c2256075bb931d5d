"""Logits and labels → figures: pure functions, checked against torchmetrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood, in nats, of (n, classes) logits and (n,) labels."""
    return float(F.cross_entropy(logits.double(), labels))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of (n,) predicted classes that are the (n,) labels."""
    return 100 * float((predicted == labels).double().mean())


def top_k(logits: Tensor, labels: Tensor, k: int) -> tuple[float, float]:
    """Percent of labels among the k highest of (n, classes) logits: over all (micro), mean over classes (macro).

    Macro counts the classes that occur in `labels`, as torchmetrics does.
    """
    hit = (logits.topk(min(k, logits.shape[1]), dim=1).indices == labels[:, None]).any(1).double()
    per_class = torch.zeros(logits.shape[1], dtype=torch.float64).index_add_(0, labels, hit)
    count = torch.bincount(labels, minlength=logits.shape[1])
    present = count > 0
    return 100 * float(hit.mean()), 100 * float((per_class[present] / count[present]).mean())


def expected_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """The top label's ECE over equal bins of confidence, in [0, 1] (Guo et al., ICML 2017)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    place = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, n_bins - 1)
    gap = torch.zeros(n_bins, dtype=torch.float64).index_add_(0, place, (predicted == labels).double() - confidence)
    return float(gap.abs().sum() / len(labels))


def calibrated(loss: Callable[[float], float], low: float = 0.05, high: float = 20.0, steps: int = 40) -> float:
    """The least `loss(temperature)` over temperatures from low to high, by golden-section search in the logarithm."""
    shrink = (5**0.5 - 1) / 2
    a, b = (float(torch.tensor(x, dtype=torch.float64).log()) for x in (low, high))

    def at(x: float) -> float:
        return loss(float(torch.tensor(x, dtype=torch.float64).exp()))

    left, right = b - shrink * (b - a), a + shrink * (b - a)
    f_left, f_right = at(left), at(right)
    for _ in range(steps):
        if f_left <= f_right:
            b, right, f_right = right, left, f_left
            left = b - shrink * (b - a)
            f_left = at(left)
        else:
            a, left, f_left = left, right, f_right
            right = a + shrink * (b - a)
            f_right = at(right)
    return min(f_left, f_right, loss(1.0))


def evaluation(logits: Tensor, labels: Tensor, split: str) -> dict[str, float]:
    """The seed's figures of one split: loss, accuracy, and for 8 classes and more the top 2 and top 5."""
    figures = {
        f"{split}_loss": cross_entropy(logits, labels),
        f"{split}_accuracy": accuracy(logits.argmax(1), labels),
    }
    if logits.shape[1] >= 8:
        for k in (2, 5):
            figures[f"{split}_micro_top{k}"], figures[f"{split}_macro_top{k}"] = top_k(logits, labels, k)
    return figures
