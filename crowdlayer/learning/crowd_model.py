"""A classifier below a crowd layer, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..data.pixels import on_device
from .crowd_layer import WorkerModel

IGNORED = -100
"""The label of an answer that is none, as torch's cross-entropy has it."""


class CrowdModel(nn.Module):
    """A classifier below a crowd layer: what is trained. To predict, take the crowd layer off."""

    def __init__(self, classifier: nn.Module, crowd_layer: WorkerModel) -> None:
        super().__init__()
        self.classifier = classifier
        self.crowd_layer = crowd_layer
        self._network: Callable[[Tensor], Tensor] | None = None

    @property
    def is_run_by_another(self) -> bool:
        """Whether something is called in the classifier's place."""
        return self._network is not None

    @contextmanager
    def run_by(self, network: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        """Call this, where there is one, in the classifier's place: the same function of the same weights."""
        self._network = network
        try:
            yield
        finally:
            self._network = None

    @property
    def confusion(self) -> Tensor:
        """(n_workers, n_classes, n_classes), as peerannot's network calls it."""
        return self.crowd_layer.matrices()

    def forward(self, images: Tensor, task: Tensor, worker: Tensor) -> tuple[Tensor, Tensor]:
        """Images and their answers → logits (tasks, classes), scores (answers, classes).

        Images are (tasks, 3, size, size) and normalised, or bytes (tasks, size, size, 3).
        """
        logits = self.logits(images)
        return logits, self.crowd_layer(logits, task, worker)

    def logits(self, images: Tensor) -> Tensor:
        """The same of the images alone."""
        if self._network is None:
            images = on_device(images, images.device)
        logits: Tensor = (self._network or self.classifier)(images)
        return logits


class CrowdLoss(nn.Module):
    """The cross-entropy of the answers: L = 1/n_task Σ_i Σ_{j ∈ A(x_i)} CE(h_i^(j), y_i^(j)).

    With reduction "answer" divided by the number of answers instead, which is peerannot's code, if not its formula.
    """

    def __init__(self, reduction: Literal["task", "answer"] = "task") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        scores: Tensor,
        label: Tensor,
        n_tasks: int | None = None,
        n_answers: int | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of (answers, classes) scores and (answers,) labels in a batch of `n_tasks` and `n_answers`.

        Where several processes share a batch, the two are its counts, not the share's, and the losses add up. A
        number of answers on the device is at least 1.
        Tasks without answers count in the mean over tasks; without any answer the loss is 0. With `weight` (answers,)
        an answer counts so much; one whose label is `IGNORED` never does.
        Of scores and labels alone it is peerannot's criterion: the mean of all whose label is not -1.
        """
        if n_tasks is None:
            return F.cross_entropy(scores, label, ignore_index=-1)
        if weight is None:
            total = F.cross_entropy(scores, label, reduction="sum")
        else:
            total = F.cross_entropy(scores, label, reduction="none") @ weight.to(scores.dtype)
        n = n_tasks if self.reduction == "task" else len(label) if n_answers is None else n_answers
        return total / (n if isinstance(n, Tensor) else max(n, 1))
