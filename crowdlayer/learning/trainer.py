"""The loop.

N processes do what one does. Each global batch is shared out by tasks, its loss divided by the global count of tasks or
answers and multiplied by N, because the gradients of N processes are averaged; each image is evaluated once. All that
is random is drawn from SEED, epoch, step and process: there is no random state to be saved.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..answers import Answers, Ints
from ..data.images import STREAM_DROPOUT, Batch, CrowdLoader, ImageLoader, Rows, stream_seed
from ..errors import InterruptedRunError, SettingsError
from ..logs import track
from ..machine.processes import Processes
from ..settings import TrainingSettings
from . import selection
from .aggregation import started
from .crowd_layer import CrowdLoss, CrowdModel, WorkerModel
from .devices import compiled, device_name, laid_out, synchronised
from .guard import Guard, fallback
from .mixup import mix
from .optimization import averaged, hold, make_optimizer, make_scheduler
from .progress import Best, History, Progress, log_epoch
from .regularizers import Regularizer
from .rows import share_rows

log = logging.getLogger(__name__)

EVALUATION_BATCHES = 4
"""Without gradients several training batches fit where one did."""


@dataclass(frozen=True)
class Validation:
    """What chooses the epoch: images with `labels` (images,), or with the `answers` of their held-out tasks."""

    images: Rows
    labels: Tensor | None
    answers: Answers | None


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tensors."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


class Mover(Protocol):
    """What an epoch asks of an optimiser."""

    def zero_grad(self) -> None: ...
    def step(self) -> object: ...


class Watch:
    """What the loop asks of its surroundings, and tells them; this one asks for nothing."""

    def stop(self) -> bool:
        """Whether this process was asked to stop; asked at every step."""
        return False

    def stopped(self, trainer: Trainer) -> NoReturn:
        """All processes stop here, between two steps; called on all of them."""
        raise InterruptedRunError("the run was interrupted")

    def epoch_done(self, trainer: Trainer) -> None:
        """An epoch is over, and in the history; called on all processes."""


class Trainer:
    """Fits a classifier through a crowd layer: `fit`, `train_epoch`, `validate`, `predict`."""

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        classifier: nn.Module,
        n_classes: int,
        train: CrowdLoader,
        n_workers: int,
        validation: Validation,
    ) -> None:
        self.accelerator = accelerator
        self.processes = Processes.joined()
        self.n_classes = n_classes
        self.train = train
        self.plain = False
        self.validation = validation
        self.guard = Guard(train.answers, n_classes, settings.n_epochs, self.processes)
        self.collapsed_since: int | None = None
        self.progress = Progress()
        self.history = History()  # what is logged of an epoch is logged from here
        self.best: Best | None = None
        self.watch = Watch()
        if settings.select_by == "accuracy" and validation.labels is None:
            raise SettingsError("SELECT_BY: accuracy needs true labels, the data set has no val/")
        self._first = on_cpu(classifier.state_dict()) if settings.guard else None
        self._build(settings, classifier)

    def _build(self, settings: TrainingSettings, classifier: nn.Module) -> None:
        """A fresh crowd layer on the classifier, and all that moves them."""
        self.settings = settings
        crowd_layer = started(settings, self.train.answers, self.n_classes)
        self.regularizer: Regularizer | None = None
        if settings.scale > 0:
            answers_of = torch.from_numpy(self.train.answers.worker).bincount(minlength=crowd_layer.n_workers)
            self.regularizer = Regularizer(settings.regularizer, crowd_layer, answers_of, self.processes)
        model = CrowdModel(compiled(laid_out(synchronised(classifier, settings)), settings), crowd_layer)
        self.criterion = CrowdLoss(settings.loss_reduction)
        if crowd_layer.row_wise:  # whose gradients the loop shares out, and not DDP
            names = [f"crowd_layer.{name}" for name, _ in crowd_layer.named_parameters()]
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(model, names)  # type: ignore[no-untyped-call]
        self.optimizer: Optimizer = make_optimizer(model, settings)
        self.scheduler = make_scheduler(self.optimizer, settings)
        self.model = model
        self.replica: CrowdModel  # the model, as it is called in training: DDP around it where there are others
        self.replica, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.average = averaged(self.model, settings.ema) if settings.ema > 0 else None
        if self.processes.count > 2 and self.accelerator.device.type == "cpu":
            self._settle()

    def _settle(self) -> None:
        """Let DDP choose its buckets, by a step that moves nothing.

        It does so after the first backward pass of a process, the run's first or the first after a resume. In which
        order gloo adds up the gradients of more than two processes depends on their place in the bucket, and so would
        the bits of that one step.
        """
        self.replica.eval()  # batch norm keeps its statistics
        _, loss = self._loss(self.replica, next(self.train.batches(0)), self.criterion)
        self.accelerator.backward(loss)
        self.optimizer.zero_grad()

    def fit(self) -> Best:
        """Train until N_EPOCHS are done, from wherever `progress` is, and return the best epoch.

        Raises:
            SettingsError: the loss is not finite any more.
            InterruptedRunError: a process was asked to stop.
        """
        self._log_start()
        while self.progress.epoch < self.settings.n_epochs:
            started = time.monotonic()
            lr, lr_crowd = (group["lr"] for group in self.optimizer.param_groups)
            train_loss = self.train_epoch(self.replica, self.train, self.criterion, self.optimizer, self.progress)
            logits = self.predict(self.validation.images)
            loss, score, figures = self.validate(logits)
            self.scheduler.step()
            epoch = self.progress.epoch + 1
            self._finite(epoch, train_loss, loss)
            if self.best is None or score < self.best.score or self.settings.select_by == "last":
                self.best = self._keep(epoch, score, figures)
            self.history.train_loss.append(train_loss)
            self.history.val_loss.append(loss)
            self.history.val_accuracy.append(figures.get("val_accuracy"))
            self.history.lr.append(lr)
            collapsed = self.guard.collapsed(epoch)
            self.history.figures.append(self._also(figures, lr_crowd))
            self.history.seconds.append(time.monotonic() - started)
            if self.settings.verbose:
                log_epoch(self.history, self.settings.n_epochs, self.best.epoch, self.accelerator.device)
            self.progress = Progress(epoch)
            if collapsed and self.collapsed_since is None:
                self._collapse(self.guard.suspicious_since)
            self.watch.epoch_done(self)
        assert self.best is not None  # N_EPOCHS is at least 1
        accuracy = self.best.figures.get("val_accuracy")
        selection.log_choice(self.best.epoch, accuracy, self.history.val_accuracy, self.settings.select_by)
        return self.best

    def train_epoch(
        self,
        model: CrowdModel,
        loader: CrowdLoader,
        criterion: CrowdLoss,
        optimizer: Mover,
        progress: Progress,
    ) -> float:
        """The rest of the epoch that `progress` is in; the mean per task of the loss while the weights moved."""
        model.train()
        bare = self._unwrapped(model)
        if self.settings.freeze:  # a frozen network keeps its batch norm statistics and drops nothing out
            bare.classifier.eval()
        progress.total = progress.total.to(loader.device)
        batches = loader.batches(progress.epoch, progress.step)
        for batch in track(batches, f"epoch {progress.epoch + 1}", len(loader), "steps", progress.step):
            self.stop_if_asked()
            torch.manual_seed(
                stream_seed(self.settings.seed, progress.epoch, STREAM_DROPOUT, progress.step, self.processes.index)
            )
            optimizer.zero_grad()
            logits, loss = self._loss(model, batch, criterion)
            self.guard.see(logits, batch.task, batch.label)
            objective = loss * self.processes.count  # of which DDP takes the mean
            if self.regularizer is not None:
                objective = objective + self.settings.scale * self.regularizer(bare.crowd_layer, logits)
            self.accelerator.backward(objective)
            if self.plain or progress.epoch < self.settings.crowd_warmup:
                hold(bare.crowd_layer)
            elif bare.crowd_layer.row_wise:
                share_rows(bare.crowd_layer, self.processes)
            optimizer.step()
            if self.average is not None:
                self.average.update_parameters(bare)
            progress.total += loss.detach() * (batch.n_tasks if criterion.reduction == "task" else batch.n_answers)
            progress.step += 1
        return float(self.processes.gather(progress.total.view(1)).sum()) / len(loader.dataset)

    def _loss(self, model: CrowdModel, batch: Batch, criterion: CrowdLoss) -> tuple[Tensor, Tensor]:
        """The logits of a step and its loss, this process's part of it."""
        if self.settings.mixup == 0:
            logits, scores = model(batch.images, batch.task, batch.worker)
            scores = self._below(logits, batch.task, scores)
            return logits, criterion(scores, batch.label, batch.n_tasks, batch.n_answers)
        mixed = mix(batch, self.settings.mixup)
        task = mixed.task.repeat(2)
        logits, scores = model(mixed.images, task, mixed.worker.flatten())
        own, others = self._below(logits, task, scores).chunk(2)
        if not self.plain:
            own = self._unwrapped(model).crowd_layer.mixed(own, others, mixed.weight)
        parts = zip(mixed.label, (mixed.weight, 1 - mixed.weight), strict=True)
        losses = [criterion(own, label, batch.n_tasks, batch.n_answers, weight) for label, weight in parts]
        return logits, losses[0] + losses[1]

    def _below(self, logits: Tensor, task: Tensor, scores: Tensor) -> Tensor:
        """The answers' scores, or without the crowd layer the logits: DDP must find every weight in the loss."""
        return logits[task] + 0 * scores if self.plain else scores

    @torch.inference_mode()
    def predict(self, images: Rows) -> Tensor:
        """(images, classes) logits of the classifier alone, float32 on the CPU, for (images, size, size, 3) uint8.

        Each process predicts its share of the images; all get all logits, the same bits.
        """
        classifier = self.classifier.eval()
        self.processes.agree(classifier)
        size = max(EVALUATION_BATCHES * self.settings.batch_size // self.processes.count, 1)
        logits = [torch.empty(0, self.n_classes)]
        batches = iter(ImageLoader(images, None, size, self.accelerator.device, self.processes))
        with self.accelerator.autocast():
            for _ in range(0, -(-len(images) // self.processes.count), size):  # as often on all, to stop together
                self.stop_if_asked()
                # forward itself: compiled code is for the shapes of steps
                logits += [classifier.forward(batch).float().cpu() for batch, _ in itertools.islice(batches, 1)]
        return self.processes.gather(torch.cat(logits))

    @torch.inference_mode()
    def validate(self, logits: Tensor) -> tuple[float, float, dict[str, float]]:
        """The validation loss, what SELECT_BY makes of it (less is better), and all figures of the split.

        With true labels the loss is the classifier's cross-entropy; without, the crowd loss of the answers.
        """
        labels, answers, rule = self.validation.labels, self.validation.answers, self.settings.select_by
        if labels is not None:
            return selection.by_labels(logits, labels, rule)
        assert answers is not None  # one of the two is there
        return *selection.by_answers(logits, answers, self.crowd_layer, rule), {}

    def learn_labels(self, labels: Ints) -> None:
        """From now on the classifier learns a label per task (tasks,), -1 for none, without the crowd layer.

        The workers' matrices stay as they are.
        """
        (task,) = (labels >= 0).nonzero()
        answers = Answers(len(labels), self.train.answers.n_workers, task, np.zeros_like(task), labels[task])
        self.train = self.train.with_answers(answers)
        self.plain = True

    @property
    def classifier(self) -> nn.Module:
        """The network below the crowd layer, as it is evaluated."""
        return self._evaluated.classifier

    @property
    def crowd_layer(self) -> WorkerModel:
        """The worker model, as it is evaluated."""
        return self._evaluated.crowd_layer

    @property
    def _evaluated(self) -> CrowdModel:
        """The model that predicts and is kept: with EMA the averaged one."""
        averaged: CrowdModel = self.model if self.average is None else self.average.module  # type: ignore[assignment]
        return averaged

    def _collapse(self, since: int | None) -> None:
        """Say so; with GUARD start again from the first weights, below matrices that the answers alone have given."""
        self.collapsed_since = since
        log.warning(
            "collapsed since epoch %d: the classifier learns little of what the crowd says%s", since,
            "; starting again with CROWD_LAYER=stochastic held at CROWD_START=dawid-skene" if self._first else "",
            extra={"collapsed_since": since},
        )  # fmt: skip
        if self._first is not None:
            self._fall_back(self._first)
            self.restart()

    def _fall_back(self, first: dict[str, Tensor]) -> None:
        """The fall-back's crowd layer, optimiser and schedule, and the first weights."""
        classifier = self.classifier
        classifier.load_state_dict(first)
        self.accelerator.free_memory()
        self._build(fallback(self.settings), classifier)

    def restart(self) -> None:
        """Count from the first epoch again, from the weights as they are."""
        self.progress, self.history, self.best = Progress(), History(), None

    def load(self, best: Best) -> None:
        """Put the weights of `best` back."""
        model = self._evaluated
        model.classifier.load_state_dict(best.classifier)
        model.crowd_layer.load_state_dict(best.crowd_layer)

    def state_dict(self) -> dict[str, Any]:
        """All that the run's future depends on, in tensors and plain values; collective.

        On the same number of processes a trainer that loads it goes on to the same bits; on another the sums of the
        loss are added up in another order.
        """
        progress = asdict(self.progress) | {"total": self.processes.gather(self.progress.total.view(1))}
        return {
            "progress": progress,
            "history": asdict(self.history),
            "best": None if self.best is None else vars(self.best).copy(),
            "collapsed_since": self.collapsed_since,
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on any number of processes."""
        totals = state["progress"]["total"]
        if len(totals) != self.processes.count:
            totals = torch.cat([totals.sum().view(1), totals.new_zeros(self.processes.count - 1)])
        self.progress = Progress(**state["progress"] | {"total": totals[self.processes.index]})
        self.history = History(**state["history"])
        self.best = None if state["best"] is None else Best(**state["best"])
        if state["collapsed_since"] is not None and self.collapsed_since is None and self._first is not None:
            self._fall_back(self._first)
        self.collapsed_since = state["collapsed_since"]
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        vars(self.scheduler.optimizer)["_opt_called"] = True  # by the earlier process; torch would warn: by nobody

    def _stateful(self) -> dict[str, Any]:
        """What has a state beside the progress, by its name in the checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        parts["guard"] = self.guard
        if self.average is not None:
            parts["average"] = self.average
        return parts if self.accelerator.scaler is None else parts | {"scaler": self.accelerator.scaler}

    def stop_if_asked(self) -> None:
        """Stop where all processes do: they agree on it, lest one wait for another that has left."""
        if self.processes.any(self.watch.stop()):
            self.watch.stopped(self)

    def _unwrapped(self, model: nn.Module) -> CrowdModel:
        unwrapped: CrowdModel = self.accelerator.unwrap_model(model)
        return unwrapped

    def _also(self, figures: dict[str, float], lr_crowd: float) -> dict[str, float]:
        """The figures of an epoch that have no list of their own; the crowd's is what it thinks of its mean worker."""
        likelihood = self.crowd_layer.answer_log_likelihood()
        right = float(likelihood.detach().diagonal(dim1=1, dim2=2).float().exp().mean())
        top5 = {"metrics/accuracy_top5": figures["val_micro_top5"]} if "val_micro_top5" in figures else {}
        return top5 | {"lr/pg1": lr_crowd, "crowd/mean_quality": right} | self.guard.figures

    def _keep(self, epoch: int, score: float, figures: dict[str, float]) -> Best:
        model = self._evaluated
        classifier, crowd_layer = (on_cpu(part.state_dict()) for part in (model.classifier, model.crowd_layer))
        confusion = model.confusion.detach().float().cpu().clone()
        return Best(epoch, score, classifier, crowd_layer, confusion, figures)

    def _finite(self, epoch: int, train_loss: float, val_loss: float) -> None:
        for name, value in (("train_loss", train_loss), ("val_loss", val_loss)):
            if not math.isfinite(value):
                raise SettingsError(f"{name}: must be finite, is {value} in epoch {epoch}: lower LR={self.settings.lr}")

    def _log_start(self) -> None:
        n, done = self.processes.count, self.progress
        log.info(
            "training %s on %s%s, precision %s: %d epochs of %d steps%s",
            self.settings.model, f"{n} processes, each on " if n > 1 else "", device_name(self.accelerator.device),
            self.accelerator.mixed_precision, self.settings.n_epochs, len(self.train),
            f"; {done.epoch} epochs and {done.step} steps are done" if done.epoch + done.step else "",
        )  # fmt: skip
