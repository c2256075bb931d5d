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
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..answers import Answers, Ints
from ..data.images import STREAM_DROPOUT, CrowdLoader, ImageLoader, Rows, stream_seed
from ..errors import InterruptedRunError, SettingsError
from ..logs import track
from ..machine.processes import Processes
from ..settings import TrainingSettings
from . import selection
from .advice import normed_by_few
from .devices import device_name, seed_all
from .guard import Guard, fallback
from .learner import Learner, on_cpu
from .progress import Best, History, Progress, log_epoch

log = logging.getLogger(__name__)

EVALUATION_BATCHES = 4
"""Without gradients several training batches fit where one did."""


@dataclass(frozen=True)
class Validation:
    """What chooses the epoch: images with `labels` (images,), or with the `answers` of their held-out tasks."""

    images: Rows
    labels: Tensor | None
    answers: Answers | None


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

    def all_failed(self, what: str) -> bool:
        """Whether all processes have failed in `what`, as this one has: then it can be left out together."""
        return True


class Trainer:
    """Fits a classifier through a crowd layer: `fit`, `train_epoch`, `validate`, `predict`."""

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        classifier: nn.Module,
        n_classes: int,
        train: CrowdLoader,
        validation: Validation,
    ) -> None:
        self.accelerator = accelerator
        self.processes = Processes.joined()
        self.n_classes = n_classes
        self.train = train
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
        self.learner = self._learner(settings, classifier)

    def _learner(self, settings: TrainingSettings, classifier: nn.Module) -> Learner:
        learner = Learner(settings, self.accelerator, classifier, self.n_classes, self.train.answers)
        if self.processes.count > 2 and self.accelerator.device.type == "cpu":
            learner.settle(next(self.train.batches(0)))
        return learner

    @property
    def settings(self) -> TrainingSettings:
        """Those that are trained by: the run's, or the guard's."""
        return self.learner.settings

    @property
    def classifier(self) -> nn.Module:
        """The network below the crowd layer, as it is evaluated."""
        return self.learner.classifier

    def fit(self) -> Best:
        """Train until N_EPOCHS are done, from wherever `progress` is, and return the best epoch.

        Raises:
            SettingsError: the loss is not finite any more.
            InterruptedRunError: a process was asked to stop.
        """
        self._log_start()
        while self.progress.epoch < self.settings.n_epochs:
            started = time.monotonic()
            lr, lr_crowd = (group["lr"] for group in self.learner.scheduler.optimizer.param_groups)
            train_loss = self.train_epoch(self.learner, self.train, self.progress)
            logits = self.predict(self.validation.images)
            loss, score, figures = self.validate(logits)
            self.learner.scheduler.step()
            epoch = self.progress.epoch + 1
            self._finite(epoch, train_loss, loss)
            if self.best is None or score < self.best.score or self.settings.select_by == "last":
                self.best = self.learner.kept(epoch, score, figures)
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
        self.learner.rest()  # another network may need the memory
        assert self.best is not None  # N_EPOCHS is at least 1
        accuracy = self.best.figures.get("val_accuracy")
        selection.log_choice(self.best.epoch, accuracy, self.history.val_accuracy, self.settings.select_by)
        return self.best

    def train_epoch(self, learner: Learner, loader: CrowdLoader, progress: Progress) -> float:
        """The rest of the epoch that `progress` is in; the mean per task of the loss while the weights moved."""
        learner.train()
        held = progress.epoch < self.settings.crowd_warmup
        progress.total = progress.total.to(loader.device)
        batches = loader.batches(progress.epoch, progress.step)
        for batch in track(batches, f"epoch {progress.epoch + 1}", len(loader), "steps", progress.step):
            self.stop_if_asked()
            place = progress.step, self.processes.index
            seed_all(stream_seed(self.settings.seed, progress.epoch, STREAM_DROPOUT, *place), loader.device)
            logits, shown, loss = learner.step(batch, held)
            self.guard.see(logits, batch.task, shown)
            per_task = learner.criterion.reduction == "task"
            progress.total.add_(loss, alpha=batch.n_tasks if per_task else batch.n_answers)
            progress.step += 1
        return float(self.processes.gather(progress.total.view(1)).sum()) / len(loader.dataset)

    def predict(self, images: Rows) -> Tensor:
        """(images, classes) logits of the classifier alone, float32 on the CPU, for (images, size, size, 3) uint8.

        Each process predicts its share of the images; all get all logits, the same bits.
        """
        try:
            return self._predicted(images)
        except torch.OutOfMemoryError:
            if self.learner.graphs is None or not self.learner.graphs.give_up():
                raise
        log.info("too little memory for an evaluation beside CUDA graphs: steps run kernel by kernel from now on")
        return self._predicted(images)

    @torch.inference_mode()
    def _predicted(self, images: Rows) -> Tensor:
        classifier = self.classifier.eval()
        self.processes.agree(classifier)
        size = max(EVALUATION_BATCHES * self.settings.batch_size // self.processes.count, 1)
        logits = [torch.empty(0, self.n_classes, device=self.accelerator.device)]
        batches = iter(ImageLoader(images, None, size, self.accelerator.device, self.processes))
        with self.accelerator.autocast():
            for _ in range(0, -(-len(images) // self.processes.count), size):  # as often on all, to stop together
                self.stop_if_asked()
                # forward itself: compiled code is for the shapes of steps
                logits += [classifier.forward(batch).float() for batch, _ in itertools.islice(batches, 1)]
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
        return *selection.by_answers(logits, answers, self.learner.crowd_layer, rule), {}

    def learn_labels(self, labels: Ints) -> None:
        """From now on the classifier learns a label per task (tasks,), -1 for none, without the crowd layer.

        Each answer of a task becomes its label: under either LOSS_REDUCTION the task weighs what it weighed, and a step
        is as long. The workers' matrices stay as they are.
        """
        given = self.train.answers
        known = labels[given.task] >= 0
        task, worker = given.task[known], given.worker[known]
        self.train = self.train.with_answers(replace(given, task=task, worker=worker, label=labels[task]))
        self.learner.plain = True
        self.learner.rest()

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
            self.progress, self.history, self.best = Progress(), History(), None  # count from the first epoch again

    def _fall_back(self, first: dict[str, Tensor]) -> None:
        """The fall-back's crowd layer, optimiser and schedule, and the first weights."""
        classifier, settings = self.learner.model.classifier, fallback(self.settings)
        classifier.load_state_dict(first)
        self.learner.rest()
        del self.learner  # the next one wants as much memory
        self.accelerator.free_memory()
        self.learner = self._learner(settings, classifier)

    def load(self, best: Best) -> None:
        """Put the weights of `best` back."""
        self.learner.load(best)

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
            "guard": self.guard.state_dict(),
            **self.learner.state_dict(),
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
        self.guard.load_state_dict(state["guard"])
        self.learner.load_state_dict(state)

    def stop_if_asked(self) -> None:
        """Stop where all processes do: they agree on it, lest one wait for another that has left."""
        if self.processes.any(self.watch.stop()):
            self.watch.stopped(self)

    def _also(self, figures: dict[str, float], lr_crowd: float) -> dict[str, float]:
        """The figures of an epoch that have no list of their own; the crowd's is what it thinks of its mean worker."""
        likelihood = self.learner.crowd_layer.answer_log_likelihood()
        right = float(likelihood.detach().diagonal(dim1=1, dim2=2).float().exp().mean())
        top5 = {"metrics/accuracy_top5": figures["val_micro_top5"]} if "val_micro_top5" in figures else {}
        return top5 | {"lr/pg1": lr_crowd, "crowd/mean_quality": right} | self.guard.figures

    def _finite(self, epoch: int, train_loss: float, val_loss: float) -> None:
        lr, lr_crowd = self.settings.lr, self.settings.lr_crowd
        rates = f"LR={lr:g}" + ("" if lr_crowd is None else f" or LR_CROWD={lr_crowd:g}")
        few = normed_by_few(self.classifier, self.settings, self.processes.count)
        for name, value, also in (("train_loss", train_loss, ""), ("val_loss", val_loss, few)):
            if not math.isfinite(value):
                raise SettingsError(f"{name}: must be finite, is {value} in epoch {epoch}: lower {rates}{also}")

    def _log_start(self) -> None:
        n, done = self.processes.count, self.progress
        log.info(
            "training %s on %s%s, precision %s: %d epochs of %d steps%s",
            self.settings.model, f"{n} processes, each on " if n > 1 else "", device_name(self.accelerator.device),
            self.accelerator.mixed_precision, self.settings.n_epochs, len(self.train),
            f"; {done.epoch} epochs and {done.step} steps are done" if done.epoch + done.step else "",
        )  # fmt: skip
