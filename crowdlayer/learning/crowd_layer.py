"""The worker models on top of the classifier.

Everywhere a matrix is shown or stored it is confusion[worker, true class, answered class].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FITTED = 10
"""Steps of iterative scaling after which a bias has the shares of a worker's answers to a thousandth."""
RIGHT_AT_START = 0.9
"""P(answer = truth) of every worker where a row-stochastic model starts at the identity: a 1 could not be moved."""


class WorkerModel(nn.Module, ABC):
    """How workers answer, given the classifier: scores for the observed answers, and for them alone.

    A model has tables with a row per worker and defines `scores`, `matrices` and `start_at`. As the classifier's
    probabilities sum to 1, each has an equivalent matrix per worker, which is what is stored.
    """

    likelihood: Literal["softmax", "direct"] = "softmax"
    """What a row of an equivalent matrix is: scores, to which a softmax gives P(answer | truth), or P itself."""
    row_wise = False
    """Whether gradients are sparse, with a row for each answer: then a step costs what its answers cost."""

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__()
        self.n_workers = n_workers
        self.n_classes = n_classes

    def forward(self, logits: Tensor, task: Tensor, worker: Tensor) -> Tensor:
        """The scores of the observed answers; work and memory grow with the answers, not with the crowd.

        Never in less than float32, whatever autocast says: the workers' gradients are small.

        Args:
            logits: z, (tasks, classes), of the classifier.
            task: (answers,) rows of `logits`.
            worker: (answers,) who answered.

        Returns:
            (answers, classes), to which a softmax gives h.
        """
        with torch.autocast(logits.device.type, enabled=False):
            probabilities = logits.to(next(self.parameters()).dtype).softmax(1)
            # probabilities[task], whose gradient CUDA would find by sorting: a dozen kernels for one
            return self.scores(F.embedding(task, probabilities), worker)

    def rows(self, table: Tensor, worker: Tensor) -> Tensor:
        """The (answers, …) rows of a (n_workers, …) table."""
        if not self.row_wise:
            # table[worker], whose gradient CUDA would find by sorting: a dozen kernels for one
            if not table.is_cuda:
                return table[worker]
            return F.embedding(worker, table.view(len(table), -1)).view(-1, *table.shape[1:])
        rows: Tensor = SparseRows.apply(table, worker)
        return rows

    @abstractmethod
    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        """(answers, classes), to which a softmax gives h, for the answers' σ(z), (answers, classes)."""

    def mixed(self, scores: Tensor, others: Tensor, weight: Tensor) -> Tensor:
        """The scores under weight · own matrices + (1 − weight) · others', from those under each; weight (answers,)."""
        return torch.lerp(others, scores, weight.to(scores.dtype).unsqueeze(1))

    @abstractmethod
    def matrices(self) -> Tensor:
        """The equivalent matrices, (n_workers, true, answered): P(answer | truth), or the scores of it."""

    @abstractmethod
    def start_at(self, confusion: Tensor) -> None:
        """Come as near as the model can to P(answer | truth), (n_workers, true, answered), all above 0."""

    def answer_log_likelihood(self) -> Tensor:
        """log P(answer | truth, worker), (n_workers, true, answered): h for a certain classifier."""
        return log_likelihood(self.matrices(), self.likelihood)


class SparseRows(torch.autograd.Function):
    """table[row], whose gradient is a sparse tensor: one that holds every worker's would be as large as the crowd."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.shape = table.shape
        return table[row]

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        (row,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(row.unsqueeze(0), gradient[0], ctx.shape, check_invariants=False), None


def log_likelihood(confusion: Tensor, likelihood: Literal["softmax", "direct"]) -> Tensor:
    """log P(answer | truth, worker) of stored matrices, (n_workers, true, answered)."""
    return confusion.log_softmax(2) if likelihood == "softmax" else confusion.log()


class CrowdLayer(WorkerModel):
    """One matrix per worker (MW of Rodrigues & Pereira, "Deep Learning from Crowds", AAAI 2018).

    score_a = Σ_t confusion[j, t, a] σ(z)_t. `confusion` (n_workers, n_classes, n_classes) starts at the identity:
    every worker right. The paper's π^(j), which multiplies from the left, is the transpose of `confusion[j]`.

    Example:
        >>> import torch
        >>> from crowdlayer import CrowdLayer
        >>> layer = CrowdLayer(n_workers=3, n_classes=2)
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # of a classifier, for two tasks
        >>> task, worker, label = torch.tensor([[0, 0, 1], [1, 2, 0], [0, 1, 1]])  # three observed answers
        >>> scores = layer(logits, task, worker)
        >>> loss = torch.nn.functional.cross_entropy(scores, label, reduction="sum") / len(logits)
        >>> loss.backward()
        >>> layer.confusion.grad.shape
        torch.Size([3, 2, 2])
    """

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__(n_workers, n_classes)
        self.confusion = nn.Parameter(torch.eye(n_classes).repeat(n_workers, 1, 1))

    @classmethod
    def of(cls, confusion: Tensor) -> CrowdLayer:
        """The layer with these matrices, (n_workers, n_classes, n_classes)."""
        layer = cls(0, confusion.shape[1])
        layer.n_workers = len(confusion)
        layer.confusion = nn.Parameter(confusion)
        return layer

    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        return torch.bmm(probabilities.unsqueeze(1), self.rows(self.confusion, worker)).squeeze(1)

    def matrices(self) -> Tensor:
        return self.confusion

    def start_at(self, confusion: Tensor) -> None:
        with torch.no_grad():
            self.confusion.copy_(centred(confusion))


class Scale(WorkerModel):
    """A factor per worker and class (VW of Rodrigues & Pereira 2018): score_a = scale[j, a] σ(z)_a, from 1."""

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__(n_workers, n_classes)
        self.scale = nn.Parameter(torch.ones(n_workers, n_classes))

    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        return self.rows(self.scale, worker) * probabilities

    def matrices(self) -> Tensor:
        return torch.diag_embed(self.scale)

    def start_at(self, confusion: Tensor) -> None:
        with torch.no_grad():
            self.scale.copy_(centred(confusion).diagonal(dim1=1, dim2=2))


class Bias(WorkerModel):
    """A summand per worker and class (VB of Rodrigues & Pereira 2018): score_a = σ(z)_a + bias[j, a], from 0."""

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__(n_workers, n_classes)
        self.bias = nn.Parameter(torch.zeros(n_workers, n_classes))

    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        return probabilities + self.rows(self.bias, worker)

    def matrices(self) -> Tensor:
        return torch.eye(self.n_classes, device=self.bias.device) + self.bias.unsqueeze(1)

    def start_at(self, confusion: Tensor) -> None:
        """Where the shares of the answers are the worker's: there the log-likelihood, which is concave, is greatest."""
        with torch.no_grad():
            self.bias.zero_()
            for _ in range(FITTED):
                self.bias.add_((confusion.mean(1) / self.answer_log_likelihood().exp().mean(1)).log())


class ScaleBias(WorkerModel):
    """Both (VW+B of Rodrigues & Pereira 2018): score_a = scale[j, a] σ(z)_a + bias[j, a], from 1 and 0."""

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__(n_workers, n_classes)
        self.scale = nn.Parameter(torch.ones(n_workers, n_classes))
        self.bias = nn.Parameter(torch.zeros(n_workers, n_classes))

    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        return self.rows(self.scale, worker) * probabilities + self.rows(self.bias, worker)

    def matrices(self) -> Tensor:
        return torch.diag_embed(self.scale) + self.bias.unsqueeze(1)

    def start_at(self, confusion: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(preferred(confusion))
            self.scale.copy_(centred(confusion).diagonal(dim1=1, dim2=2) - self.bias)


class Scalar(WorkerModel):
    """One factor per worker (SW of Rodrigues & Pereira 2018): score = scalar[j] σ(z), from 1."""

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__(n_workers, n_classes)
        self.scalar = nn.Parameter(torch.ones(n_workers))

    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        return self.rows(self.scalar, worker).unsqueeze(1) * probabilities

    def matrices(self) -> Tensor:
        return self.scalar.view(-1, 1, 1) * torch.eye(self.n_classes, device=self.scalar.device)

    def start_at(self, confusion: Tensor) -> None:
        with torch.no_grad():
            self.scalar.copy_(centred(confusion).diagonal(dim1=1, dim2=2).mean(1))


class Stochastic(WorkerModel):
    """A row-stochastic matrix per worker (Tanno et al., "Learning From Noisy Labels By Regularized Estimation Of
    Annotator Confusion", CVPR 2019): P(answer = a) = Σ_t A[j, t, a] σ(z)_t, A[j, t] = softmax(weight[j, t]).

    The scores are log P(answer), which a softmax gives back: the likelihood is taken without a second one.
    """

    likelihood = "direct"

    def __init__(self, n_workers: int, n_classes: int) -> None:
        super().__init__(n_workers, n_classes)
        odds = RIGHT_AT_START / (1 - RIGHT_AT_START) * (n_classes - 1)
        self.weight = nn.Parameter(math.log(odds) * torch.eye(n_classes).repeat(n_workers, 1, 1))

    def scores(self, probabilities: Tensor, worker: Tensor) -> Tensor:
        mixed = torch.bmm(probabilities.unsqueeze(1), self.rows(self.weight, worker).softmax(2)).squeeze(1)
        return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()

    def mixed(self, scores: Tensor, others: Tensor, weight: Tensor) -> Tensor:
        return super().mixed(scores.exp(), others.exp(), weight).clamp_min(torch.finfo(scores.dtype).tiny).log()

    def matrices(self) -> Tensor:
        return self.weight.softmax(2)

    def answer_log_likelihood(self) -> Tensor:
        return self.weight.log_softmax(2)  # the logarithm of a softmax that has come to 0 has no gradient

    def start_at(self, confusion: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(centred(confusion))


WORKER_MODELS: dict[str, type[WorkerModel]] = {
    "matrix": CrowdLayer,
    "scale": Scale,
    "bias": Bias,
    "scale+bias": ScaleBias,
    "scalar": Scalar,
    "stochastic": Stochastic,
}
"""The worker models by their name in CROWD_LAYER."""


def centred(confusion: Tensor) -> Tensor:
    """log P(answer | truth) up to a constant per row, which a softmax does not see: the wrong answers' mean is 0."""
    logs = confusion.log()
    right = logs.diagonal(dim1=1, dim2=2)
    return logs - ((logs.sum(2) - right) / (logs.shape[2] - 1)).unsqueeze(2)


def preferred(confusion: Tensor) -> Tensor:
    """(n_workers, answered): the mean of `centred` over the true classes that the answer is not, so over its errors."""
    logs = centred(confusion)
    return (logs.sum(1) - logs.diagonal(dim1=1, dim2=2)) / (logs.shape[1] - 1)
