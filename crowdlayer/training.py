"""What every training process does: build, go on from a checkpoint, train, save, stop when asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import logs
from .data.dataset import Dataset
from .errors import InterruptedRunError, SettingsError, StoreError, short
from .learning.baselines import compare
from .learning.classifier import has_small_stem
from .learning.devices import bound_to_container, device_name, memory_for
from .learning.experiment import Experiment, Images, Outcome, Phases, load_images
from .learning.folds import cross_fit
from .learning.further import Further
from .learning.progress import History
from .learning.spool import PARTS, Identity, Parts, Spool, going_on, read_state
from .learning.trainer import Trainer, Watch
from .machine import interruption
from .machine.launch import Launch, Peers, as_alone, as_torchrun
from .machine.meeting import Meeting, lost_peers
from .machine.processes import Processes, join
from .machine.watchdog import Watchdog
from .report.trackers import Trackers, wanted
from .settings import Settings

log = logging.getLogger(__name__)

PLAN, TRAINED = "plan.npz", "trained.npz"
"""What a run's processes hand to each other, in the folder of the run."""
PATIENCE = 30.0
"""Seconds that the watchdog waits longer than processes do for each other: who misses another shall say so itself."""
TOGETHER = 10.0
"""Seconds within which all processes run out of memory that do so in the same step."""


@dataclass(frozen=True)
class Plan:
    """What the processes of a node are to do, found out once: the settings, and the data set on this machine.

    `weights`: the state dict that PRETRAINED names; `resume`: the parts of the checkpoint to go on from, on the run's
    first node; none to begin; `tracked`: whether trackers are told.
    """

    settings: Settings
    dataset: Dataset
    root: Path
    digests: Mapping[str, str]
    weights: Path | None
    workdir: Path
    spool: Spool
    resume: Mapping[str, Path]
    tracked: bool = True

    @property
    def pretrained(self) -> bool | Path:
        """As a classifier is built."""
        return self.weights or self.settings.pretrained is True

    def images(self) -> tuple[Dataset, Images]:
        """The data set without broken images, and the decoded ones: once on a node, then they are there for all."""
        most = self.settings.max_bad_images
        return load_images(self.dataset, self.root, self.settings, most, self.workdir, self.digests)


@dataclass(frozen=True)
class Trained:
    """A finished run, as its first process tells it.

    `dataset` is without the images that were broken; `devices` has the device of each process, `seconds` a value per
    phase.
    """

    outcome: Outcome
    dataset: Dataset
    devices: list[str]
    small_stem: bool
    seconds: dict[str, float]


class Keeper(Watch):
    """Saves the run's state to the spool, and stops the run when a signal asks for it."""

    def __init__(
        self,
        spool: Spool,
        every: int,
        watchdog: Watchdog,
        trackers: Trackers,
        further: Further,
        meeting: Meeting | None = None,
    ) -> None:
        """`every`: epochs between checkpoints; 0 for none but the last epoch's, should what follows be interrupted.

        `meeting`: of the run's processes, where there are several.
        """
        self.spool = spool
        self.every = every
        self.watchdog = watchdog
        self.trackers = trackers
        self.further = further
        self.meeting = meeting

    def stop(self) -> bool:
        self.watchdog.progress()
        return interruption.heard() is not None

    def stopped(self, trainer: Trainer) -> NoReturn:
        self.save(trainer)
        progress, n = trainer.progress, trainer.settings.n_epochs
        heard = interruption.heard()
        who = "another process" if heard is None else heard.name
        where = f"in epoch {progress.epoch + 1} of {n}, after {progress.step} of {len(trainer.train)} steps"
        where = where if progress.epoch < n else "after its last epoch"
        raise InterruptedRunError(f"{who}: {self.what} was interrupted {where}")

    @property
    def what(self) -> str:
        """What is trained."""
        return "the run"

    def epoch_done(self, trainer: Trainer) -> None:
        epoch = trainer.progress.epoch
        if epoch:  # at 0 the guard has sent the run back to its start
            self.trackers.log(epoch_figures(trainer.history), epoch)
        if epoch == trainer.settings.n_epochs or (self.every and epoch % self.every == 0):
            self.save(trainer)

    def all_failed(self, what: str) -> bool:
        if self.meeting is None:
            return True
        return self.meeting.all_say(f"{what} has failed", Processes.joined().count, TOGETHER)

    def save(self, trainer: Trainer) -> None:
        """Leave the trainer's state in the spool."""
        state = trainer.state_dict() | {"further": self.further.state_dict()}
        if trainer.processes.index == 0:
            self.spool.write(state)


class KeeperOfFurther(Keeper):
    """The same for further trainings: their state is saved beside the run's, which is over; trackers hear nothing."""

    def __init__(self, keeper: Keeper, run: Trainer) -> None:
        super().__init__(keeper.spool, keeper.every, keeper.watchdog, Trackers({}, {}), keeper.further, keeper.meeting)
        self._run = run
        self._written: Parts = {}

    @property
    def what(self) -> str:
        return self.further.under_way

    def save(self, trainer: Trainer) -> None:
        further = self.further.state_dict() | {"state": trainer.state_dict()}
        state = self._run.state_dict() | {"further": further}
        if trainer.processes.index == 0:
            written = self.spool.write(state, self._written)
            self._written = {name: part for name, part in written.items() if name != "further"}


def train(plan: Plan, decoded: tuple[Dataset, Images], phases: Phases) -> Trained:
    """Train by the plan, alone.

    Raises:
        InterruptedRunError: the process was asked to stop; the state is in the spool.
    """
    as_alone()  # whatever a script has left; of several, `_train` says so
    watchdog = Watchdog(plan.settings.timeout + PATIENCE)
    with watchdog.watching():
        return _train(plan, decoded, phases, watchdog, None)


def train_together(plan: Plan, phases: Phases, meeting: Meeting, launch: Launch, peers: Peers) -> Trained:
    """Train by the plan, as one of `peers`, whose first has decoded the images of its node.

    Raises:
        InterruptedRunError: a process was asked to stop; the state is in the spool.
        PeerError: another process is gone, or silent.
    """
    watchdog = Watchdog(plan.settings.timeout + PATIENCE)
    with lost_peers():
        as_torchrun(launch, peers)
        join(meeting, peers.rank, peers.world)
        same_everywhere(plan.spool.identity, Processes.joined())
        if peers.rank:
            logs.only_errors()  # the first says it for all
        with watchdog.watching():
            return _train(plan, plan.images(), phases, watchdog, meeting)


def same_everywhere(identity: Identity, processes: Processes) -> None:
    """Refuse nodes that do not train the same: each has read its own environment, and the data for itself.

    Raises:
        SettingsError: the settings differ.
        StoreError: the data does: a bucket that is still being filled, a mount that lags behind.
    """
    first, *others = (json.loads(text) for text in processes.gather_texts(json.dumps(identity.told())))
    for number, other in enumerate(others, 1):
        for name, value in first["settings"].items():
            if (theirs := other["settings"].get(name)) != value:
                raise SettingsError(
                    f"{name.upper()}: must be the same on all nodes, is {short(json.dumps(value))} for process 0 and "
                    f"{short(json.dumps(theirs))} for process {number}"
                )
        if other["data_digest"] != first["data_digest"]:
            raise StoreError(f"the data must be the same on all nodes, process {number} has read others than process 0")


def _train(
    plan: Plan, decoded: tuple[Dataset, Images], phases: Phases, watchdog: Watchdog, meeting: Meeting | None
) -> Trained:
    """Build, go on from a checkpoint if there is one, train, evaluate."""
    settings, processes = plan.settings, Processes.joined()
    experiment = Experiment(*decoded, settings, plan.pretrained, plan.workdir)
    bound_to_container()
    with phases("build"):
        trainer = experiment.trainer()
        further = _gone_on(trainer, plan.resume if processes.index == 0 else {})
    with interruption.deferred(), _trackers(settings, plan.tracked and processes.index == 0) as trackers:
        trainer.watch = keeper = Keeper(plan.spool, settings.checkpoint_every, watchdog, trackers, further, meeting)
        outcome = experiment.run(trainer, phases)
        after = KeeperOfFurther(keeper, trainer)
        outcome = cross_fit(experiment, outcome, further, after, phases)
        outcome = compare(experiment, outcome, further, after, phases)
        of_test = {name: value for name, value in outcome.figures.items() if name.startswith("test_")}
        trackers.log({name.replace("_", "/", 1): value for name, value in of_test.items()})
    used = processes.gather_texts(device_name(trainer.accelerator.device))
    return Trained(outcome, experiment.dataset, used, has_small_stem(trainer.classifier), phases.seconds)


def _gone_on(trainer: Trainer, brought: Mapping[str, Path]) -> Further:
    """Let the trainer go on from the parts of a checkpoint, which one process has; how far further ones were.

    Nothing else of the checkpoint stays in memory.
    """
    parts = {name: trainer.processes.share(_taken(brought.get(name))) for name in PARTS}
    if not all(parts.values()):
        return Further()
    with memory_for("the checkpoint", "give the job more memory"), going_on():
        state = read_state(parts)
        trainer.load_state_dict(state)
        return Further(**state["further"])


def _trackers(settings: Settings, tells: bool) -> Trackers:
    """Those that are asked for, of the process that `tells` them."""
    to, file = settings.tensorboard, settings.metrics_file
    made = wanted(settings.output_name, to, file, settings.log_format) if tells else {}
    return Trackers(made, settings.model_dump(mode="json"))


def epoch_figures(history: History) -> dict[str, float]:
    """The figures of the newest epoch, those that exist, under the names that they have in results.csv."""
    figures = {
        "train/loss": history.train_loss[-1],
        "val/loss": history.val_loss[-1],
        "metrics/accuracy_top1": history.val_accuracy[-1],
        "lr/pg0": history.lr[-1],
        "seconds": history.seconds[-1],
    }
    return {name: value for name, value in figures.items() if value is not None} | history.figures[-1]


def _taken(path: Path | None) -> bytes:
    """What is in the file, which is needed no more: the disk may be small."""
    if path is None:
        return b""
    data = path.read_bytes()
    path.unlink()
    return data
