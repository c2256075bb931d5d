"""What SCALE weighs: terms that are added to the loss of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .crowd_layer import WorkerModel

Name = Literal["identity", "pooled", "trace", "geo-w", "geo-f"]
Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes, without gradient."""
RIDGE = 1e-6
"""Added to the diagonal of what a logarithm of a determinant is taken of: fewer images than classes are no −∞."""


class Regularizer:
    """One of the terms, by its name in REGULARIZER; M are a worker model's matrices, A its P(answer | truth).

    All but geo-f look at every worker, so with SCALE above 0 a step costs what the crowd's size costs.

    identity: Σ_j ‖M_j − M_j⁰‖², the squared distance from the start. With weight SCALE beside a mean over tasks it is
        a Gaussian prior of precision 2 · n_tasks · SCALE on every entry: a worker with few answers stays near the
        start. Sensible: 1e-5 to 1e-2.
    pooled: Σ_j w_j ‖M_j − M̄‖², w_j = n̄ / (n̄ + n_j), with n_j the worker's answers, n̄ their mean, M̄ = Σ_j n_j M_j /
        Σ_j n_j the crowd's mean: partial pooling (Gelman & Hill, "Data Analysis Using Regression and
        Multilevel/Hierarchical Models", 2006), which pulls most who answered least. Sensible: 1e-5 to 1e-2.
    trace: 1/J Σ_j tr(A_j), to be made small: of all matrices that explain the answers the least diagonal are the
        workers' own (Tanno et al., CVPR 2019, equation 4). Sensible: 1e-3 to 1e-1, theirs is 1e-2.
    geo-w: −log det(1/J Σ_j A_j A_jᵀ), whose volume is to be made large (GeoCrowdNet(W) of Ibrahim, Nguyen & Fu, "Deep
        Learning From Crowdsourced Labels", ICLR 2023, equation 9). Sensible: 1e-4 to 1e-2.
    geo-f: −log det(1/n Σ_i σ(z_i) σ(z_i)ᵀ) over the step's n images: predictions are to be sure, and of all classes
        (GeoCrowdNet(F), equation 8). Sensible: 1e-4 to 1e-2; BATCH_SIZE should be well above the number of classes.
    """

    def __init__(self, name: Name, model: WorkerModel, answers_of: Tensor) -> None:
        """`model` at its start; `answers_of` (n_workers,): how many answers each worker gave."""
        self.name = name
        self.start = model.matrices().detach().clone() if name == "identity" else None
        self.answers_of = answers_of

    def __call__(self, model: WorkerModel, logits: Tensor, total: Total) -> Tensor:
        """The term for this step.

        Args:
            logits: (tasks, classes) of this process's share of the step.
            total: sums over processes. The gradient of geo-f is that of this process's share, to be summed too; the
                others' is whole on every process.
        """
        match self.name:
            case "identity":
                assert self.start is not None  # __init__ has made it
                return (model.matrices() - self.start.to(logits.device)).square().sum()
            case "pooled":
                return pooled(model.matrices(), self.answers_of)
            case "trace":
                likelihood = model.answer_log_likelihood().exp()
                return likelihood.diagonal(dim1=1, dim2=2).sum(1).mean()
            case "geo-w":
                likelihood = model.answer_log_likelihood().exp()
                return -log_determinant(torch.einsum("jta,jsa->ts", likelihood, likelihood) / len(likelihood))
            case "geo-f":
                return geo_f(logits, total)


def pooled(matrices: Tensor, answers_of: Tensor) -> Tensor:
    answers_of = answers_of.to(matrices)
    mean = answers_of.mean()
    share = answers_of / answers_of.sum()
    crowd = torch.einsum("j,jta->ta", share, matrices)
    weight = mean / (mean + answers_of)
    return torch.einsum("j,jta->", weight, (matrices - crowd).square())


def geo_f(logits: Tensor, total: Total) -> Tensor:
    probabilities = F.softmax(logits.double(), dim=1)
    own = probabilities.T @ probabilities
    everyones = own + (total(own.detach()) - own.detach())  # the value of all, the gradient of these
    return -log_determinant(everyones / total(torch.tensor(len(logits), device=logits.device)))


def log_determinant(gram: Tensor) -> Tensor:
    """log det(gram + RIDGE · 1), float64, of a positive semi-definite `gram`."""
    ridge = RIDGE * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    root: Tensor = torch.linalg.cholesky(gram.double() + ridge)
    return 2 * root.diagonal().log().sum()
