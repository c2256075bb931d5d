"""A classifier below its crowd layer, and all that one step needs to move them."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..answers import Answers
from ..data.images import Batch
from ..machine.processes import Processes
from ..settings import TrainingSettings
from .aggregation import started
from .crowd_layer import CrowdLoss, CrowdModel, WorkerModel
from .devices import compiled, laid_out, synchronised
from .mixup import mix
from .optimization import averaged, hold, make_optimizer, make_scheduler
from .progress import Best
from .regularizers import Regularizer
from .rows import share_rows


class Mover(Protocol):
    """What a step asks of an optimiser."""

    def zero_grad(self) -> None: ...
    def step(self) -> object: ...


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tensors."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


class Learner:
    """A fresh crowd layer on a classifier, and what moves both: `step`, and between epochs `scheduler.step`."""

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        classifier: nn.Module,
        n_classes: int,
        answers: Answers,
    ) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.processes = Processes.joined()
        self.plain = False
        """Whether the classifier learns the answers as they are, without the crowd layer."""
        crowd_layer = started(settings, answers, n_classes)
        self.regularizer: Regularizer | None = None
        if settings.scale > 0:
            answers_of = torch.from_numpy(answers.worker).bincount(minlength=crowd_layer.n_workers)
            self.regularizer = Regularizer(settings.regularizer, crowd_layer, answers_of, self.processes)
        self.model = CrowdModel(compiled(laid_out(synchronised(classifier, settings)), settings), crowd_layer)
        self.criterion = CrowdLoss(settings.loss_reduction)
        if crowd_layer.row_wise:  # whose gradients the step shares out, and not DDP
            names = [f"crowd_layer.{name}" for name, _ in crowd_layer.named_parameters()]
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.model, names)  # type: ignore[no-untyped-call]
        optimizer = make_optimizer(self.model, settings)
        self.scheduler = make_scheduler(optimizer, settings)
        self.replica: CrowdModel  # the model, as it is called in training: DDP around it where there are others
        self.optimizer: Mover
        self.replica, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.average: AveragedModel | None = averaged(self.model, settings.ema) if settings.ema > 0 else None

    def settle(self, batch: Batch) -> None:
        """Let DDP choose its buckets, by a step that moves nothing.

        It does so after the first backward pass of a process, the run's first or the first after a resume. In which
        order gloo adds up the gradients of more than two processes depends on their place in the bucket, and so would
        the bits of that one step.
        """
        self.replica.eval()  # batch norm keeps its statistics
        self.accelerator.backward(self._loss(batch)[1])
        self.optimizer.zero_grad()

    def lent(self, model: CrowdModel, criterion: CrowdLoss, optimizer: Mover) -> Learner:
        """The same with a caller's parts for the time of an epoch."""
        other = copy.copy(self)
        other.replica, other.criterion, other.optimizer = model, criterion, optimizer
        return other

    def train(self) -> None:
        """Make ready for steps."""
        self.replica.train()
        if self.settings.freeze:  # a frozen network keeps its batch norm statistics and drops nothing out
            self._bare.classifier.eval()

    def step(self, batch: Batch, held: bool) -> tuple[Tensor, Tensor]:
        """Move the weights by one batch, this process's share of it; with `held` the crowd layer stays as it is.

        Returns:
            The logits before the step (tasks, classes), and the loss (): this process's part of that of all.
        """
        bare = self._bare
        self.optimizer.zero_grad()
        logits, loss = self._loss(batch)
        objective = loss * self.processes.count  # of which DDP takes the mean
        if self.regularizer is not None:
            objective = objective + self.settings.scale * self.regularizer(bare.crowd_layer, logits)
        self.accelerator.backward(objective)
        if self.plain or held:
            hold(bare.crowd_layer)
        elif bare.crowd_layer.row_wise:
            share_rows(bare.crowd_layer, self.processes)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(bare)
        return logits.detach(), loss.detach()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits of a step and its loss, this process's part of it."""
        if self.settings.mixup == 0:
            logits, scores = self.replica(batch.images, batch.task, batch.worker)
            scores = self._below(logits, batch.task, scores)
            return logits, self.criterion(scores, batch.label, batch.n_tasks, batch.n_answers)
        mixed = mix(batch, self.settings.mixup)
        task = mixed.task.repeat(2)
        logits, scores = self.replica(mixed.images, task, mixed.worker.flatten())
        own, others = self._below(logits, task, scores).chunk(2)
        if not self.plain:
            own = self._bare.crowd_layer.mixed(own, others, mixed.weight)
        parts = zip(mixed.label, (mixed.weight, 1 - mixed.weight), strict=True)
        losses = [self.criterion(own, label, batch.n_tasks, batch.n_answers, weight) for label, weight in parts]
        return logits, losses[0] + losses[1]

    def _below(self, logits: Tensor, task: Tensor, scores: Tensor) -> Tensor:
        """The answers' scores, or without the crowd layer the logits: DDP must find every weight in the loss."""
        return logits[task] + 0 * scores if self.plain else scores

    @property
    def _bare(self) -> CrowdModel:
        """The model that steps move, as nobody has wrapped it."""
        bare: CrowdModel = self.accelerator.unwrap_model(self.replica)
        return bare

    @property
    def evaluated(self) -> CrowdModel:
        """The model that predicts and is kept: with EMA the averaged one."""
        averaged: CrowdModel = self.model if self.average is None else self.average.module  # type: ignore[assignment]
        return averaged

    @property
    def classifier(self) -> nn.Module:
        """The network below the crowd layer, as it is evaluated."""
        return self.evaluated.classifier

    @property
    def crowd_layer(self) -> WorkerModel:
        """The worker model, as it is evaluated."""
        return self.evaluated.crowd_layer

    def kept(self, epoch: int, score: float, figures: dict[str, float]) -> Best:
        """The weights as they are evaluated now, which `epoch` ended with."""
        model = self.evaluated
        classifier, crowd_layer = (on_cpu(part.state_dict()) for part in (model.classifier, model.crowd_layer))
        confusion = model.confusion.detach().float().cpu().clone()
        return Best(epoch, score, classifier, crowd_layer, confusion, figures)

    def load(self, best: Best) -> None:
        """Put the weights of `best` back."""
        self.classifier.load_state_dict(best.classifier)
        self.crowd_layer.load_state_dict(best.crowd_layer)

    def state_dict(self) -> dict[str, Any]:
        """The state of every part that has one, by its name in the checkpoint."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        vars(self.scheduler.optimizer)["_opt_called"] = True  # by the earlier process; torch would warn: by nobody

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "scaler": self.accelerator.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}
