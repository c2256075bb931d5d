"""What moves the weights: optimisers and their schedules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..settings import TrainingSettings
from .crowd_model import CrowdModel
from .rows import RowWiseAdam, RowWiseAdamW, RowWiseSGD


class Mover(Protocol):
    """What a step asks of an optimiser."""

    def zero_grad(self) -> None: ...
    def step(self) -> object: ...


class Both:
    """Two optimisers as one: peerannot has one for the classifier and one for the workers' matrices."""

    def __init__(self, *optimizers: Mover) -> None:
        self._optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


class Matrices:
    """The second group of an optimiser of two, the workers' matrices, in the place of peerannot's second optimiser.

    What is written to its group counts; to move it is the whole optimiser's, which does it on the way.
    """

    def __init__(self, whole: Optimizer) -> None:
        self.whole = whole

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.whole.param_groups[1:]

    def zero_grad(self) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""


class MatricesSchedule:
    """In the place of peerannot's second scheduler: the first one moves all rates."""

    def __init__(self, optimizer: Matrices) -> None:
        self.optimizer = optimizer

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self) -> None:
        """Nothing."""


def make_optimizer(model: CrowdModel, settings: TrainingSettings) -> Optimizer:
    """One optimiser, two groups: the classifier with weight decay, the workers' matrices without.

    Decay would pull the matrices to zero, where no worker ever answers anything, and not to the identity. Fused: one
    pass over the weights, where the default takes several (resnet18 on a CPU: 10 ms a step instead of 31).
    """
    groups = [
        {"params": [p for p in model.classifier.parameters() if p.requires_grad], "weight_decay": settings.decay},
        {
            "params": list(model.crowd_layer.parameters()),
            "weight_decay": 0.0,
            "lr": settings.lr if settings.lr_crowd is None else settings.lr_crowd,
        },
    ]
    fused = settings.mixed_precision != "fp16"  # a fused step takes the scale of fp16 off itself, but not off rows
    match settings.optimizer:
        case "sgd":
            return RowWiseSGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
        case "adam":
            return RowWiseAdam(groups, lr=settings.lr, fused=fused)
        case "adamw":
            return RowWiseAdamW(groups, lr=settings.lr, fused=fused)


def make_scheduler(optimizer: Optimizer, settings: TrainingSettings) -> LRScheduler:
    """Stepped once per epoch, and never handed to accelerate, which steps once per process."""
    match settings.scheduler:
        case "multistep":
            return MultiStepLR(optimizer, list(settings.milestones), settings.lr_decay)
        case "cosine":
            return CosineAnnealingLR(optimizer, settings.n_epochs)
        case "none":
            return MultiStepLR(optimizer, [])


def hold(module: nn.Module) -> None:
    """Let the next step of the optimiser leave the module as it is: without a gradient nothing moves, nor decays."""
    for parameter in module.parameters():
        parameter.grad = None


class Average(AveragedModel):
    """A copy that follows the model: after each step decay · itself + (1 − decay) · the model, buffers too.

    After the first it is the model. Torch's own would wait for the GPU in every step, to tell it which step it is.
    """

    def __init__(self, model: CrowdModel, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.requires_grad_(False)
        self._follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follow by a step."""
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for own, new in zip(_numbers(self.module), _numbers(model), strict=True):
            mine, theirs = by_type.setdefault(own.dtype, ([], []))
            mine.append(own)
            theirs.append(new)
        for mine, theirs in by_type.values():
            if self.n_averaged == 0:
                torch._foreach_copy_(mine, theirs)
            else:
                self._follow(mine, theirs, self.n_averaged)
        self.n_averaged += 1


def _numbers(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
