"""Trainings after the run's own, which FOLDS and BASELINES ask for: one after another, and how far they have come."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import DeviceMemoryError, SettingsError
from ..logs import about
from .spool import going_on
from .trainer import Trainer, Watch

log = logging.getLogger(__name__)


@dataclass
class Further:
    """How far they have come.

    `done`: what came of each, by name, in plain values and tensors; None where it was left out. `state`: of the trainer
    of the next one, until that goes on from it. `under_way`: the name of that which is trained now.
    """

    done: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    under_way: str = ""

    def train(self, what: str, which: str, work: Callable[[], Any], watch: Watch) -> Any:
        """What comes of `work`, the training that is called `what` `which`: now, or when it was done before.

        None where the memory of the device does not suffice for a second network, or where it diverges: the run itself
        is done, and worth more.

        Raises:
            InterruptedRunError: the process was asked to stop.
            DeviceMemoryError, SettingsError: so it is on some processes only, for which the others wait in a step.
        """
        name = f"{what} {which}"
        if name not in self.done:
            gc.collect()  # the one before lies in cycles, with its weights on the device
            self.under_way = name
            with about(what, which):
                try:
                    self.done[name] = work()
                except (DeviceMemoryError, SettingsError) as error:
                    if isinstance(error, SettingsError) and self.state is not None:
                        raise  # a checkpoint that is none of ours
                    if not watch.all_failed(name):
                        raise type(error)(f"{name}: {error}; so it is on some processes only") from error
                    log.warning("left out: %s", error)
                    self.done[name] = self.state = None
        return self.done[name]

    def go_on(self, trainer: Trainer) -> None:
        """Let the trainer of the next one go on from the state, if there is one."""
        if self.state is not None:
            with going_on():
                trainer.load_state_dict(self.state)
        self.state = None  # it is as large as a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments of one that goes on from here."""
        return {"done": self.done, "state": self.state}
