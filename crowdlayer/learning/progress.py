"""How far a run has come, what has happened, and how that is said while it goes on."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..logs import duration
from .devices import device_memory

log = logging.getLogger(__name__)


@dataclass
class History:
    """What happened, a value per epoch; None where a figure does not exist."""

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float | None] = field(default_factory=list)
    val_accuracy: list[float | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    """Whatever else is known of an epoch, under its name in results.csv: metrics/…, lr/…, crowd/…"""

    def seconds_left(self, n_epochs: int) -> float:
        """For the epochs that remain, at the median of those done; the first, which warms up, counts while alone."""
        done = self.seconds[1:] or self.seconds
        return (n_epochs - len(self.seconds)) * statistics.median(done)


@dataclass(frozen=True)
class Best:
    """The chosen epoch, from 1, with the weights it ended with, on the CPU, and its validation figures."""

    epoch: int
    score: float
    classifier: dict[str, Tensor]
    crowd_layer: dict[str, Tensor]
    figures: dict[str, float]


@dataclass
class Progress:
    """How far a run has come: whole epochs, steps of the epoch under way, and what these have brought.

    `total` (): the sum over this process's tasks (or answers) of the loss, on the device, never read within an epoch.
    """

    epoch: int = 0
    step: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))


def log_epoch(history: History, n_epochs: int, best_epoch: int, device: torch.device) -> None:
    """One line on the newest epoch, with what the rest will take; after the first, one on memory."""
    epoch, left = len(history.train_loss), history.seconds_left(n_epochs)
    fields = {
        "epoch": epoch,
        "train_loss": history.train_loss[-1],
        "val_loss": history.val_loss[-1],
        "val_accuracy": history.val_accuracy[-1],
        "lr": history.lr[-1],
        "seconds": round(history.seconds[-1], 3),
        "seconds_left": round(left, 1),
        "best_epoch": best_epoch,
        "crowd_agreement": history.figures[-1].get("crowd/agreement"),
    }
    accuracy = "" if fields["val_accuracy"] is None else f"  val_accuracy {fields['val_accuracy']:5.1f} %"
    agreement = "" if fields["crowd_agreement"] is None else f"  agreement {fields['crowd_agreement']:.2f}"
    log.info(
        "epoch %*d/%d  train_loss %.4f  val_loss %.4f%s%s  %.1f s%s%s",
        len(str(n_epochs)), epoch, n_epochs, fields["train_loss"], fields["val_loss"],
        accuracy, agreement, fields["seconds"], f"  {duration(left)} left" if left else "",
        "  best" if best_epoch == epoch else "", extra=fields,
    )  # fmt: skip
    if len(history.seconds) == 1 and left:
        used, there = device_memory(device)
        log.info(
            "memory: %.1f of %.1f GB used by this process; at the first epoch's rate the others take %s",
            used / 1e9, there / 1e9, duration(left), extra={"memory_bytes": used, "memory_total_bytes": there},
        )  # fmt: skip
