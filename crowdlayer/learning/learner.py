"""A classifier below its crowd layer, and all that one step needs to move them."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from ..answers import Answers
from ..data.images import Batch
from ..machine.processes import Processes
from ..settings import TrainingSettings
from .aggregation import started
from .crowd_layer import CrowdLayer, WorkerModel
from .crowd_model import CrowdLoss, CrowdModel
from .devices import compiled, laid_out, synchronised
from .graphs import Graphs
from .kernels import available, crowd_loss, of_classes
from .mixup import Mixed, mix, unmixed
from .moving import Moving
from .optimization import Average, Mover, hold, make_optimizer, make_scheduler
from .progress import Best
from .recorded import Recorded, recorded
from .regularizers import Regularizer
from .rows import share_rows


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
        self.model = CrowdModel(compiled(laid_out(synchronised(classifier, settings)), settings), crowd_layer)
        self.criterion = CrowdLoss(settings.loss_reduction)
        if crowd_layer.row_wise:  # whose gradients the step shares out, and not DDP
            names = [f"crowd_layer.{name}" for name, _ in crowd_layer.named_parameters()]
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.model, names)  # type: ignore[no-untyped-call]
        optimizer = make_optimizer(self.model, settings)
        self.scheduler = make_scheduler(optimizer, settings)
        self.replica: CrowdModel  # the model, as it is called in training: DDP around it where there are others
        self.bare = self.model  # what steps move, as nobody has wrapped it
        self.optimizer: Mover
        self.replica, prepared = accelerator.prepare(self.model, optimizer)
        # only fp16 needs the wrapper, which looks for packages on the disk at every step
        self.optimizer = optimizer if accelerator.scaler is None else prepared
        self.graphs: Graphs | None = None
        self._moving: Moving | None = None
        if self._recordable():
            if self._apart() and isinstance(optimizer, SGD) and available(accelerator.device):
                self._moving = Moving(optimizer, accelerator.device)
            self.graphs = Graphs(self._recorded, self._gradients, list(self.model.parameters()))
        self.regularizer: Regularizer | None = None
        if settings.scale > 0:
            answers_of = torch.from_numpy(answers.worker).bincount(minlength=crowd_layer.n_workers)
            self.regularizer = Regularizer(settings.regularizer, crowd_layer, answers_of, self.processes)
        self.average = Average(self.model, settings.ema) if settings.ema > 0 else None

    def settle(self, batch: Batch) -> None:
        """Let DDP choose its buckets, by a step that moves nothing.

        It does so after the first backward pass of a process, the run's first or the first after a resume. In which
        order gloo adds up the gradients of more than two processes depends on their place in the bucket, and so would
        the bits of that one step.
        """
        self.replica.eval()  # batch norm keeps its statistics
        self.accelerator.backward(self._loss(self._mixed(batch))[1])
        self.optimizer.zero_grad()

    def lent(self, model: CrowdModel, criterion: CrowdLoss, optimizer: Mover) -> Learner:
        """The same with a caller's parts for the time of an epoch."""
        other = copy.copy(self)
        other.replica, other.criterion, other.optimizer, other.graphs = model, criterion, optimizer, None
        other.bare = self.accelerator.unwrap_model(model)
        return other

    def rest(self) -> None:
        """Give back what only steps of this kind need: they are over, or the next ones are others."""
        if self.graphs is not None:
            self.graphs.forget()

    def train(self) -> None:
        """Make ready for steps."""
        self.replica.train(not self.settings.freeze)  # frozen, it keeps its batch norm statistics and drops nothing out

    def step(self, batch: Batch, held: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Move the weights by one batch, this process's share of it; with `held` the crowd layer stays as it is.

        Returns:
            The logits before the step (tasks, classes), the answers that they are to meet (answers,), and the loss ():
            this process's part of that of all.
        """
        bare, mixed = self.bare, self._mixed(batch)
        held = held or self.plain
        if self.graphs is None:
            logits, loss = self._gradients(mixed)
        else:
            self._move(held)
            logits, loss = self.graphs(mixed, batch.most_answers, batch.mean_answers)
        if held:
            hold(bare.crowd_layer)
        elif bare.crowd_layer.row_wise:
            share_rows(bare.crowd_layer, self.processes)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(bare)
        return logits, mixed.shown, loss

    def _move(self, held: bool) -> None:
        """Tell what moves weights on the way by which rates, and whether the crowd layer is one of them."""
        if self._moving is None:
            return
        groups = 1 if held else 2
        if self._moving.groups != groups:
            self._moving.groups = groups
            self.rest()  # recordings would go on as before
        self._moving.follow()

    def _mixed(self, batch: Batch) -> Mixed:
        return mix(batch, self.settings.mixup) if self.settings.mixup > 0 else unmixed(batch)

    def _gradients(self, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Leave a step's gradients with the weights; its logits, and its loss, this process's part of it."""
        self.optimizer.zero_grad()
        logits, loss = self._loss(mixed)
        n = self.processes.count
        objective = loss * n if n > 1 else loss  # DDP takes the mean
        if self.regularizer is not None:
            objective = objective + self.settings.scale * self.regularizer(self.bare.crowd_layer, logits)
        if self.accelerator.scaler is None:  # all else that accelerate does is to divide by 1, in two kernels
            objective.backward()  # type: ignore[no-untyped-call]
        else:
            self.accelerator.backward(objective)
        return logits.detach(), loss.detach()

    def _recorded(self, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """The same, in the way that is worth recording; what is `_moving` has moved some weights."""
        with self.bare.run_by(self._network):
            return self._gradients(mixed)

    @cached_property
    def _network(self) -> Recorded | None:
        """The classifier as recorded steps run it, where they do in another way than others; in training."""
        device = self.accelerator.device
        return recorded(self.model.classifier, device, self._moving) if self._apart() else None

    def _apart(self) -> bool:
        return self.settings.compile == "auto" and self.accelerator.mixed_precision == "bf16"

    def _loss(self, mixed: Mixed) -> tuple[Tensor, Tensor]:
        """The logits of a step and its loss, this process's part of it."""
        if self._has_kernels(mixed):
            n = mixed.n_tasks if self.criterion.reduction == "task" else mixed.n_answers
            with self.accelerator.autocast():  # as in the replica
                logits = self.bare.logits(mixed.images).float()
            confusion = self.bare.crowd_layer.matrices()
            return logits, crowd_loss(logits, confusion, mixed.task, mixed.worker[0], mixed.label[0], n)
        task = mixed.task if mixed.weight is None else mixed.task.repeat(2)
        logits, scores = self.replica(mixed.images, task, mixed.worker.flatten())
        scores = self._below(logits, task, scores)
        if mixed.weight is None:
            return logits, self.criterion(scores, mixed.label[0], mixed.n_tasks, mixed.n_answers)
        own, others = scores.chunk(2)
        if not self.plain:
            own = self.bare.crowd_layer.mixed(own, others, mixed.weight)
        parts = zip(mixed.label, (mixed.weight, 1 - mixed.weight), strict=True)
        losses = [self.criterion(own, label, mixed.n_tasks, mixed.n_answers, weight) for label, weight in parts]
        return logits, losses[0] + losses[1]

    def _has_kernels(self, mixed: Mixed) -> bool:
        """Whether the crowd layer and its loss of this step are `crowd_loss`."""
        layer = self.bare.crowd_layer
        usual = type(layer) is CrowdLayer and mixed.weight is None and not self.plain and of_classes(layer.n_classes)
        return usual and self.bare.is_run_by_another and available(mixed.images.device)

    def _recordable(self) -> bool:
        """Whether steps may come from CUDA graphs: on one GPU, and all alike.

        They are not where rows wait, or a determinant is to be found, for which libraries ask the host.
        """
        settings = self.settings
        wanted = settings.compile != "false" and self.accelerator.device.type == "cuda" and self.processes.count == 1
        asking = settings.scale > 0 and settings.regularizer in ("geo-w", "geo-f")
        return wanted and not (asking or settings.freeze or self.model.crowd_layer.row_wise)

    def _below(self, logits: Tensor, task: Tensor, scores: Tensor) -> Tensor:
        """The answers' scores, or without the crowd layer the logits: DDP must find every weight in the loss."""
        return logits[task] + 0 * scores if self.plain else scores

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
        return Best(epoch, score, classifier, crowd_layer, figures)

    def load(self, best: Best) -> None:
        """Put the weights of `best` back; those that were moved are none of the run's any more, if others were kept."""
        for model in {self.model, self.evaluated}:
            model.classifier.load_state_dict(best.classifier)
            model.crowd_layer.load_state_dict(best.crowd_layer)

    def state_dict(self) -> dict[str, Any]:
        """The state of every part that has one, by its name in the checkpoint."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rest()  # what has been recorded moves the optimiser's tensors, which are others now
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
