"""Mixup over answers: images, workers' matrices and answers mixed together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Beta

from ..data.images import Batch
from ..data.pixels import sent


@dataclass(frozen=True)
class Mixed:
    """A step's images, each mixed with another, and its answers, each with an answer to the other image.

    `images` (tasks, 3, size, size), or where nothing is mixed a batch's `rows`; `task` (answers,) rows of `images`;
    `worker` and `label` (2, answers): the answer's own, then the other's; `weight` (answers,): the share of the own.
    Where nothing is mixed `worker` and `label` are (1, answers), and there are no weights. `n_tasks`, `n_answers`: of
    all processes, the latter () on the device for a graph.
    """

    images: Tensor
    task: Tensor
    worker: Tensor
    label: Tensor
    weight: Tensor | None
    n_tasks: int
    n_answers: int | Tensor

    @property
    def shown(self) -> Tensor:
        """(answers,): of the two answers that to the image of which more is seen."""
        own = self.label[0]
        return own if self.weight is None else torch.where(self.weight >= 0.5, own, self.label[1])


def unmixed(batch: Batch) -> Mixed:
    """The batch as it is."""
    worker, label = batch.worker.unsqueeze(0), batch.label.unsqueeze(0)
    return Mixed(batch.rows, batch.task, worker, label, None, batch.n_tasks, batch.n_answers)


def mix(batch: Batch, alpha: float) -> Mixed:
    """Image i becomes λ x_i + (1 − λ) x_i', with λ from Beta(α, α), and each answer to i meets one to i'.

    After annot-mix (Herde et al., "Annot-Mix: Learning with Noisy Class Labels from Multiple Annotators via a Mixup
    Extension", ECAI 2024): worker and answer are mixed as the images are. i' is another image of this process's share
    of the step, and of its answers one is drawn; where it has none, the answer meets itself. Draws from torch's
    generator on the CPU.
    """
    n, device = len(batch.images), batch.images.device
    share = sent(Beta(torch.tensor(alpha), torch.tensor(alpha)).sample((n,)), device)
    other = sent(torch.randperm(n), device)
    draw = sent(torch.rand(len(batch.task)), device)
    images = torch.lerp(batch.images[other], batch.images, share.view(-1, 1, 1, 1).to(batch.images.dtype))

    count = torch.zeros(n, dtype=torch.int64, device=device).index_add_(0, batch.task, torch.ones_like(batch.task))
    theirs = other[batch.task]
    within = (draw * count[theirs]).long()
    met = (count.cumsum(0) - count)[theirs] + within  # answers lie task by task
    met = torch.where(count[theirs] > 0, met, torch.arange(len(met), device=device))
    worker, label = (torch.stack([part, part[met]]) for part in (batch.worker, batch.label))
    return Mixed(images, batch.task, worker, label, share[batch.task], batch.n_tasks, batch.n_answers)
