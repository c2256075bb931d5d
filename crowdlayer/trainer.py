"""The loop. The only module that imports accelerate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from . import metrics
from .answers import Answers
from .crowd_layer import CrowdLayer, CrowdLoss, CrowdModel
from .errors import DeviceMemoryError, SettingsError
from .images import STREAM_DROPOUT, CrowdLoader, ImageLoader, stream_seed
from .settings import TrainingSettings

log = logging.getLogger(__name__)

NOTEWORTHY = 5.0
"""Percent of validation accuracy that a rule may give away without a word."""
EVALUATION_BATCHES = 4
"""Without gradients several training batches fit where one did."""


@dataclass
class History:
    """What happened, a value per epoch; None where a figure does not exist."""

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float | None] = field(default_factory=list)
    val_accuracy: list[float | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Best:
    """The chosen epoch, from 1, with the weights it ended with, on the CPU, and its validation figures."""

    epoch: int
    score: float
    classifier: dict[str, Tensor]
    confusion: Tensor
    figures: dict[str, float]


@dataclass(frozen=True)
class Validation:
    """What chooses the epoch: images with `labels` (images,), or with the `answers` of their held-out tasks."""

    images: Tensor
    labels: Tensor | None
    answers: Answers | None


@contextmanager
def enough_memory(settings: TrainingSettings) -> Iterator[None]:
    """Say which settings need less memory when there is too little.

    Raises:
        DeviceMemoryError: out of memory on the device; on the CPU torch says so in a RuntimeError.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
            raise DeviceMemoryError(
                f"out of memory with MODEL={settings.model}, BATCH_SIZE={settings.batch_size} and "
                f"IMG_SIZE={settings.img_size}: lower one of them"
            ) from error
        raise


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """Accelerate for the devices at hand, in the precision that MIXED_PRECISION names."""
    precision = settings.mixed_precision
    if precision == "auto":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "no"
    if precision == "fp16" and not torch.cuda.is_available():
        raise SettingsError("MIXED_PRECISION: fp16 needs a GPU, there is none")
    if Path("/dev/nvidiactl").exists() and not torch.cuda.is_available():
        log.warning(
            "there is an NVIDIA driver, but torch %s (CUDA %s) sees no GPU: training on the CPU",
            torch.__version__, torch.version.cuda,
        )  # fmt: skip
    # Accelerate keeps the first precision of a process for good; a notebook may ask for another.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())


def devices(device: torch.device) -> list[str]:
    """The device trained on, with its name."""
    return [f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)]


def make_optimizer(model: CrowdModel, settings: TrainingSettings) -> Optimizer:
    """One optimiser, two groups: the classifier with weight decay, the workers' matrices without.

    Decay would pull the matrices to zero, where no worker ever answers anything, and not to the identity.
    """
    groups = [
        {"params": [p for p in model.classifier.parameters() if p.requires_grad], "weight_decay": settings.decay},
        {"params": list(model.crowd_layer.parameters()), "weight_decay": 0.0},
    ]
    match settings.optimizer:
        case "sgd":
            return SGD(groups, lr=settings.lr, momentum=settings.momentum)
        case "adam":
            return Adam(groups, lr=settings.lr)
        case "adamw":
            return AdamW(groups, lr=settings.lr)


def make_scheduler(optimizer: Optimizer, settings: TrainingSettings) -> LRScheduler:
    """Stepped once per epoch, and never handed to accelerate, which steps once per process."""
    match settings.scheduler:
        case "multistep":
            return MultiStepLR(optimizer, list(settings.milestones), settings.lr_decay)
        case "cosine":
            return CosineAnnealingLR(optimizer, settings.n_epochs)
        case "none":
            return MultiStepLR(optimizer, [])


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
        self.settings = settings
        self.accelerator = accelerator
        model = CrowdModel(classifier, CrowdLayer(n_workers, n_classes))
        self.criterion = CrowdLoss(settings.loss_reduction)
        self.optimizer: Optimizer = make_optimizer(model, settings)
        self.scheduler = make_scheduler(self.optimizer, settings)
        self.model: CrowdModel
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.train = train
        self.validation = validation
        self.history = History()
        if settings.select_by == "accuracy" and validation.labels is None:
            raise SettingsError("SELECT_BY: accuracy needs true labels, the data set has no val/")

    def fit(self) -> Best:
        """Train for N_EPOCHS and return the best epoch.

        Raises:
            SettingsError: the loss is not finite any more.
        """
        best: Best | None = None
        log.info(
            "training %s on %s, precision %s: %d epochs of %d steps",
            self.settings.model, ", ".join(devices(self.accelerator.device)), self.accelerator.mixed_precision,
            self.settings.n_epochs, len(self.train),
        )  # fmt: skip
        for epoch in range(1, self.settings.n_epochs + 1):
            started = time.monotonic()
            torch.manual_seed(stream_seed(self.settings.seed, epoch, STREAM_DROPOUT))
            lr = self.optimizer.param_groups[0]["lr"]
            train_loss = self.train_epoch(self.model, self.train, self.criterion, self.optimizer)
            logits = self.predict(self.validation.images)
            loss, score, figures = self.validate(logits)
            self.scheduler.step()
            self._finite(epoch, train_loss, loss)
            if best is None or score < best.score or self.settings.select_by == "last":
                best = self._keep(epoch, score, figures)
            self.history.train_loss.append(train_loss)
            self.history.val_loss.append(loss)
            self.history.val_accuracy.append(figures.get("val_accuracy"))
            self.history.lr.append(lr)
            self.history.seconds.append(time.monotonic() - started)
            if self.settings.verbose:
                self._log_epoch(epoch, best.epoch)
        assert best is not None  # N_EPOCHS is at least 1
        self._log_choice(best)
        return best

    def train_epoch(self, model: CrowdModel, loader: CrowdLoader, criterion: CrowdLoss, optimizer: Optimizer) -> float:
        """One pass over `loader`; the mean per task of the loss while the weights moved."""
        model.train()
        if self.settings.freeze:  # a frozen network keeps its batch norm statistics and drops nothing out
            self._unwrapped(model).classifier.eval()
        total = torch.zeros((), dtype=torch.float32, device=loader.device)
        for batch in loader:
            n_tasks = len(batch.images)
            optimizer.zero_grad()
            scores = model(batch.images, batch.task, batch.worker)
            loss = criterion(scores, batch.label, n_tasks)
            objective = loss
            if self.settings.scale > 0:
                objective = loss + self.settings.scale * self._unwrapped(model).crowd_layer.penalty()
            self.accelerator.backward(objective)
            optimizer.step()
            total += loss.detach() * (n_tasks if criterion.reduction == "task" else len(batch.label))
        return float(total) / len(loader.dataset)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """(images, classes) logits of the classifier alone, float32 on the CPU, for (images, size, size, 3) uint8."""
        classifier = self._unwrapped(self.model).classifier
        classifier.eval()
        loader = ImageLoader(images, None, EVALUATION_BATCHES * self.settings.batch_size, self.accelerator.device)
        with self.accelerator.autocast():
            return torch.cat([classifier(batch).float().cpu() for batch, _ in loader])

    @torch.inference_mode()
    def validate(self, logits: Tensor) -> tuple[float, float, dict[str, float]]:
        """The validation loss, what SELECT_BY makes of it (less is better), and all figures of the split.

        With true labels the loss is the classifier's cross-entropy; without, the crowd loss of the answers.
        """
        labels, answers = self.validation.labels, self.validation.answers
        figures: dict[str, float] = {}
        at_temperature: Callable[[float], float]
        if labels is not None:
            figures = metrics.evaluation(logits, labels, "val")
            loss = figures["val_loss"]
            at_temperature = lambda temperature: metrics.cross_entropy(logits / temperature, labels)  # noqa: E731
        else:
            assert answers is not None
            crowd_layer = CrowdLayer.of(self._unwrapped(self.model).confusion.cpu())
            crowd_loss = CrowdLoss("task")
            task, worker, label = (torch.from_numpy(part) for part in (answers.task, answers.worker, answers.label))
            at_temperature = lambda temperature: float(  # noqa: E731
                crowd_loss(crowd_layer(logits / temperature, task, worker), label, answers.n_tasks)
            )
            loss = at_temperature(1.0)
        match self.settings.select_by:
            case "accuracy":
                return loss, -figures["val_accuracy"], figures
            case "calibrated_loss" if math.isfinite(loss):
                return loss, metrics.calibrated(at_temperature), figures
            case _:
                return loss, loss, figures

    def load(self, best: Best) -> None:
        """Put the weights of `best` back."""
        model = self._unwrapped(self.model)
        model.classifier.load_state_dict(best.classifier)
        with torch.no_grad():
            model.confusion.copy_(best.confusion)

    def _unwrapped(self, model: nn.Module) -> CrowdModel:
        unwrapped: CrowdModel = self.accelerator.unwrap_model(model)
        return unwrapped

    def _keep(self, epoch: int, score: float, figures: dict[str, float]) -> Best:
        model = self._unwrapped(self.model)
        state = {name: tensor.detach().cpu().clone() for name, tensor in model.classifier.state_dict().items()}
        return Best(epoch, score, state, model.confusion.detach().float().cpu().clone(), figures)

    def _finite(self, epoch: int, train_loss: float, val_loss: float) -> None:
        for name, value in (("train_loss", train_loss), ("val_loss", val_loss)):
            if not math.isfinite(value):
                raise SettingsError(f"{name}: must be finite, is {value} in epoch {epoch}: lower LR={self.settings.lr}")

    def _log_choice(self, best: Best) -> None:
        """Say so where another rule would have chosen a much better epoch: a loss punishes over-confidence first."""
        known = [(value, epoch) for epoch, value in enumerate(self.history.val_accuracy, 1) if value is not None]
        if known and max(known)[0] - best.figures["val_accuracy"] >= NOTEWORTHY:
            log.warning(
                "SELECT_BY=%s chose epoch %d with val_accuracy %.1f %%, epoch %d has %.1f %%: "
                "consider SELECT_BY=accuracy or calibrated_loss",
                self.settings.select_by, best.epoch, best.figures["val_accuracy"], *max(known)[::-1],
            )  # fmt: skip

    def _log_epoch(self, epoch: int, best_epoch: int) -> None:
        history = self.history
        fields = {
            "epoch": epoch,
            "train_loss": history.train_loss[-1],
            "val_loss": history.val_loss[-1],
            "val_accuracy": history.val_accuracy[-1],
            "lr": history.lr[-1],
            "seconds": round(history.seconds[-1], 3),
            "best_epoch": best_epoch,
        }
        accuracy = "" if fields["val_accuracy"] is None else f"  val_accuracy {fields['val_accuracy']:5.1f} %"
        log.info(
            "epoch %*d/%d  train_loss %.4f  val_loss %.4f%s  %.1f s%s",
            len(str(self.settings.n_epochs)), epoch, self.settings.n_epochs, fields["train_loss"], fields["val_loss"],
            accuracy, fields["seconds"], "  best" if best_epoch == epoch else "", extra=fields,
        )  # fmt: skip
