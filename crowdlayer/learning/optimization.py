"""What moves the weights: optimisers and their schedules."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..settings import TrainingSettings
from .crowd_layer import CrowdModel
from .rows import RowWiseAdam, RowWiseAdamW, RowWiseSGD


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


def averaged(model: CrowdModel, decay: float) -> AveragedModel:
    """A copy that follows the model: after each step decay · itself + (1 − decay) · the model, buffers too."""
    follow = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    return average.requires_grad_(False)
