"""Logits and labels → figures: pure functions, checked against torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TOP_K, TOP_K_FROM = (2, 5), 8
"""The k of the top-k figures, and from how many classes on there are such figures."""
N_BINS = 15
"""Equal bins of confidence, of the calibration error and the reliability diagram."""
TEMPERATURES = 0.05, 20.0
"""The least and the greatest that is looked for."""


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


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The top label's ECE over equal bins of confidence, in [0, 1] (Guo et al., ICML 2017)."""
    return float(calibration_gaps(logits, labels).abs().sum() / len(labels))


def calibration_gaps(logits: Tensor, labels: Tensor) -> Tensor:
    """(N_BINS,): how many more of a bin's labels are right than its confidences promise; sums add up."""
    confidence, predicted = logits.double().softmax(1).max(1)
    gap = (predicted == labels).double() - confidence
    return torch.zeros(N_BINS, dtype=torch.float64).index_add_(0, _bins(confidence), gap)


def brier(logits: Tensor, labels: Tensor) -> float:
    """The mean squared distance, in [0, 2], of (n, classes) probabilities from the (n,) labels (Brier 1950)."""
    probabilities = logits.double().softmax(1)
    return float((probabilities - F.one_hot(labels, logits.shape[1])).square().sum(1).mean())


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """How far the probabilities can be believed: `ece`, `brier`, `log_loss`; each is better the lower it is."""
    return {
        "ece": expected_calibration_error(logits, labels),
        "brier": brier(logits, labels),
        "log_loss": cross_entropy(logits, labels),
    }


def reliability_bins(logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """The reliability diagram: the mean `confidence`, `accuracy` and the `count` of each bin that is not empty."""
    confidence, predicted = logits.double().softmax(1).max(1)
    place, hit = _bins(confidence), (predicted == labels).double()
    sums = torch.zeros(N_BINS, 3, dtype=torch.float64)
    sums.index_add_(0, place, torch.stack([confidence, hit, torch.ones_like(hit)], 1))
    return [
        {"confidence": float(c / n), "accuracy": float(h / n), "count": int(n)} for c, h, n in sums.tolist() if n > 0
    ]


def confusion_matrix(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(true, predicted) counts."""
    return torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)


def best_temperature(loss: Callable[[float], float], steps: int = 40) -> float:
    """The temperature within `TEMPERATURES` with the least `loss`, by golden-section search in the logarithm."""
    shrink = (5**0.5 - 1) / 2
    a, b = map(math.log, TEMPERATURES)

    def at(x: float) -> float:
        return loss(math.exp(x))

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
    found = math.exp(left if f_left <= f_right else right)
    return found if min(f_left, f_right) <= loss(1.0) else 1.0


def fitted_temperature(loss: Callable[[float], float], n: int) -> float:
    """The temperature with the least mean `loss` over `n` observations and one more, which speaks for about 1.

    That one is a log-normal prior: where all n are right, the lower the temperature the lower the loss, and a handful
    of images would make the classifier certain of everything.
    """
    return best_temperature(lambda temperature: loss(temperature) + math.log(temperature) ** 2 / (2 * n))


def calibrated(loss: Callable[[float], float], steps: int = 40) -> float:
    """The least `loss(temperature)`."""
    return loss(best_temperature(loss, steps=steps))


def evaluation(logits: Tensor, labels: Tensor, split: str) -> dict[str, float]:
    """The seed's figures of one split: loss, accuracy, and from `TOP_K_FROM` classes on the top 2 and top 5."""
    figures = {
        f"{split}_loss": cross_entropy(logits, labels),
        f"{split}_accuracy": accuracy(logits.argmax(1), labels),
    }
    if logits.shape[1] >= TOP_K_FROM:
        for k in TOP_K:
            figures[f"{split}_micro_top{k}"], figures[f"{split}_macro_top{k}"] = top_k(logits, labels, k)
    return figures


def _bins(confidence: Tensor) -> Tensor:
    """(n,): which of N_BINS equal bins of [0, 1] each of the (n,) confidences lies in."""
    edges = torch.linspace(0, 1, N_BINS + 1, dtype=torch.float64)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, N_BINS - 1)
