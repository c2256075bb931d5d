"""The worker model on top of the classifier, its loss, and what both say together about a task's true class.

Everywhere a matrix is shown or stored it is confusion[worker, true class, answered class].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrowdLayer(nn.Module):
    """One matrix per worker (MW of Rodrigues & Pereira, "Deep Learning from Crowds", AAAI 2018).

    `confusion` (n_workers, n_classes, n_classes) starts at the identity: every worker right. The paper's π^(j),
    which multiplies from the left, is the transpose of `confusion[j]`.
    """

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__()
        self.confusion = nn.Parameter(torch.eye(n_classes).repeat(n_workers, 1, 1))

    @classmethod
    def of(cls, confusion: Tensor) -> CrowdLayer:
        """The layer with these matrices, (n_workers, n_classes, n_classes)."""
        layer = cls(0, confusion.shape[1])
        layer.confusion = nn.Parameter(confusion)
        return layer

    def forward(self, logits: Tensor, task: Tensor, worker: Tensor) -> Tensor:
        """The scores of the observed answers.

        For answer (i, j): score_a = Σ_t confusion[j, t, a] σ(z_i)_t. Work and memory grow with the answers, not with
        the crowd. Never in less than float32, whatever autocast says: the matrices' gradients are small.

        Args:
            logits: z, (tasks, classes), of the classifier.
            task: (answers,) rows of `logits`.
            worker: (answers,) rows of `confusion`.

        Returns:
            (answers, classes), to which a softmax gives h.
        """
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits.to(self.confusion.dtype).softmax(1)
            return torch.bmm(probabilities[task].unsqueeze(1), self.confusion[worker]).squeeze(1)

    def penalty(self) -> Tensor:
        """REGULARIZER=identity: Σ_j ‖confusion[j] − I‖², the squared distance from the start.

        With weight SCALE beside a mean over tasks it is a Gaussian prior of precision 2 · n_tasks · SCALE on every
        entry: a worker with few answers stays near the identity. Sensible: 1e-5 to 1e-2.
        """
        return (self.confusion - torch.eye(self.confusion.shape[1], device=self.confusion.device)).square().sum()

    def answer_log_likelihood(self) -> Tensor:
        """log P(answer | true class, worker) of the model, (n_workers, true, answered): h for a certain classifier."""
        return self.confusion.log_softmax(2)


class CrowdModel(nn.Module):
    """A classifier below a crowd layer: what is trained. To predict, take the crowd layer off."""

    def __init__(self, classifier: nn.Module, crowd_layer: CrowdLayer) -> None:
        super().__init__()
        self.classifier = classifier
        self.crowd_layer = crowd_layer

    @property
    def confusion(self) -> nn.Parameter:
        """(n_workers, n_classes, n_classes), as peerannot's network calls it."""
        return self.crowd_layer.confusion

    def forward(self, images: Tensor, task: Tensor, worker: Tensor) -> Tensor:
        """(tasks, 3, size, size) images and their answers' indices → scores (answers, classes)."""
        scores: Tensor = self.crowd_layer(self.classifier(images), task, worker)
        return scores


class CrowdLoss(nn.Module):
    """The cross-entropy of the answers: L = 1/n_task Σ_i Σ_{j ∈ A(x_i)} CE(h_i^(j), y_i^(j)).

    With reduction "answer" divided by the number of answers instead, which is peerannot's code, if not its formula.
    """

    def __init__(self, reduction: Literal["task", "answer"] = "task") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, scores: Tensor, label: Tensor, n_tasks: int, n_answers: int | None = None) -> Tensor:
        """The loss of (answers, classes) scores and (answers,) labels in a batch of `n_tasks` and `n_answers`.

        Where several processes share a batch, the two are its counts, not the share's, and the losses add up.
        Tasks without answers count in the mean over tasks; without any answer the loss is 0.
        """
        total = F.cross_entropy(scores, label, reduction="sum")
        return total / max(n_tasks if self.reduction == "task" else len(label) if n_answers is None else n_answers, 1)


def posterior(logits: Tensor, likelihood: Tensor, task: Tensor, worker: Tensor, label: Tensor) -> Tensor:
    """P(true class | image, answers), (tasks, classes): Bayes' rule with the classifier's output as the prior.

    Args:
        logits: (tasks, classes).
        likelihood: log P(answered | true, worker), (n_workers, true, answered).
        task, worker, label: (answers,) each.
    """
    log_prior = logits.double().log_softmax(1)
    return log_prior.index_add(0, task, likelihood.double()[worker, :, label]).softmax(1)
