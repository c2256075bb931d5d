"""What SCALE weighs: terms that are added to the loss of a step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..machine.processes import Processes
from .crowd_layer import WorkerModel

Name = Literal["identity", "pooled", "trace", "geo-w", "geo-f"]
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

    def __init__(self, name: Name, model: WorkerModel, answers_of: Tensor, processes: Processes) -> None:
        """`model` at its start, where it is trained; `answers_of` (n_workers,): how many answers each worker gave."""
        self.name = name
        self.start = model.matrices().detach().clone() if name == "identity" else None
        self.answers_of = answers_of.to(next(model.parameters()))
        self.processes = processes

    def __call__(self, model: WorkerModel, logits: Tensor) -> Tensor:
        """The term for this step, for (tasks, classes) logits of this process's share of it.

        The gradients' mean over processes is the term's gradient.
        """
        match self.name:
            case "identity":
                assert self.start is not None  # __init__ has made it
                return (model.matrices() - self.start).square().sum()
            case "pooled":
                return pooled(model.matrices(), self.answers_of)
            case "trace":
                likelihood = model.answer_log_likelihood().exp()
                return likelihood.diagonal(dim1=1, dim2=2).sum(1).mean()
            case "geo-w":
                return geo_w(model.answer_log_likelihood().exp())
            case "geo-f":
                return geo_f(logits, self.processes)


def pooled(matrices: Tensor, answers_of: Tensor) -> Tensor:
    mean = answers_of.mean()
    share = answers_of / answers_of.sum()
    crowd = torch.einsum("j,jta->ta", share, matrices)
    weight = mean / (mean + answers_of)
    return torch.einsum("j,jta->", weight, (matrices - crowd).square())


def geo_w(likelihood: Tensor) -> Tensor:
    # of rows that are nearly the same float32 loses the difference: half of ten classes' gradient was noise
    rows = likelihood.double().transpose(0, 1).flatten(1)  # (true, workers times answered)
    return -log_determinant(rows @ rows.T / len(likelihood))


def geo_f(logits: Tensor, processes: Processes) -> Tensor:
    probabilities = F.softmax(logits.double(), dim=1)
    gram, n = probabilities.T @ probabilities, len(logits)
    if processes.count > 1:
        everyones = processes.gather(gram.detach().unsqueeze(0)).sum(0).to(gram.device)
        share = processes.count * gram
        gram = everyones + (share - share.detach())  # the value of all, the gradient of this share
        n = int(processes.gather(torch.tensor([n])).sum())
    return -log_determinant(gram / n)


def log_determinant(gram: Tensor) -> Tensor:
    """log det(gram + RIDGE · 1), float64, of a positive semi-definite `gram`; NaN where the run has come to NaN."""
    ridge = RIDGE * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    root, failed = torch.linalg.cholesky_ex(gram.double() + ridge)  # which raises nothing: the loss tells of NaN
    return torch.where(failed == 0, 2 * root.diagonal().log().sum(), math.nan)
