"""The class of peerannot on our trainer: a notebook written for it runs after changing the import line."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from . import logs
from .data.images import CrowdLoader, ImageLoader, Rows
from .data.layout import ANSWERS, belongs, read_dataset
from .errors import SettingsError, listed
from .learning.baselines import compare
from .learning.classifier import has_small_stem
from .learning.crowd_model import CrowdLoss, CrowdModel
from .learning.devices import device_name
from .learning.experiment import Experiment, Phases, load_images, log_dataset
from .learning.learner import Mover
from .learning.progress import Progress
from .learning.trainer import EVALUATION_BATCHES, Trainer
from .report.publishing import publish
from .report.results import Finished, Provenance, headline, results_name
from .settings import DataSettings, TrainingSettings, nearest, setting_complaints
from .storage.places import Folder
from .storage.sync import digest_of, fetch, sync

DECIDED_BY_DATA = frozenset({"n_workers", "labels", "metadata_path", "n_params", "dataset", "strategy"})
"""What peerannot's command line hands over beside the settings; the data decide."""


class Crowdlayer:
    """Learn a classifier from the answers of a crowd (Rodrigues & Pereira, AAAI 2018).

    Minimises, for the classifier's scores z_i and a matrix π^(j) per worker,

        L = 1/n_task Σ_i Σ_{j ∈ A(x_i)} CE(h_i^(j), y_i^(j)),   h_i^(j) = σ(π^(j) σ(z_i)).

    Args:
        tasks_path: the folder with train/, and optionally val/, test/ and metadata.json.
        answers: the JSON file {task: {worker: label}}.
        model: a classification model of torchvision.models, by name.
        n_classes: the number of classes; must agree with the data.
        optimizer: "sgd", "adam" or "adamw", any case.
        n_epochs: how often every task is seen.
        scale: the weight of the regulariser in the loss.
        verbose: log every epoch.
        pretrained: start from torchvision's weights, or from a state dict's file.
        output_name: the prefix of the files written.
        kwargs: any other setting of the data set and of the training, by its name in small letters, as
            crowdlayer/docs/settings.md has them: batch_size, lr, momentum, decay, scheduler, milestones, lr_decay,
            img_size, data_augmentation, num_workers, freeze, seed, path_remove …

    Raises:
        SettingsError: an argument is unknown or wrong.
        DataError: the data set or the answers cannot be used.

    Example:
        >>> from crowdlayer import Crowdlayer
        >>> strategy = Crowdlayer(
        ...     "shapes", "shapes/answers.json", model="resnet18", n_classes=3, optimizer="adam", n_epochs=2,
        ...     lr=0.001, batch_size=16, img_size=16, verbose=False,
        ... )
        >>> results = strategy.run()
        >>> results["class_names"]
        ['blue', 'green', 'red']
        >>> len(results["val_accuracy"])
        2
    """

    def __init__(
        self,
        tasks_path: str | Path,
        answers: str | Path,
        model: str,
        n_classes: int,
        optimizer: str,
        n_epochs: int,
        scale: float = 0,
        verbose: bool = True,
        pretrained: bool | str | Path = False,
        output_name: str = "crowdlayer",
        **kwargs: Any,
    ) -> None:
        self.tasks_path = Path(tasks_path).resolve()
        self.output_name = output_name
        self._given: dict[str, Any] = {
            "tasks": str(self.tasks_path),
            "answers": str(answers),
            "model": model,
            "n_classes": n_classes,
            "optimizer": optimizer,
            "n_epochs": n_epochs,
            "scale": scale,
            "verbose": verbose,
            "pretrained": str(pretrained) if isinstance(pretrained, Path) else pretrained,
        }
        self._trainer: Trainer | None = None
        self._phases = Phases()
        self.setup(**kwargs)

    def setup(self, **kwargs: Any) -> None:
        """Make the training, validation and test loaders; with settings that differ, the network anew too."""
        given = self._given | self._known(kwargs)
        data, training = _checked(given)
        before = None if self._trainer is None else (self._data, self._training)
        self._given = given
        self._data: DataSettings = data
        self._training: TrainingSettings = training
        if before != (data, training):
            self._prepare()

    def _known(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` without what the data decide; `output_name` and `tasks_path` may come again."""
        names = {*DataSettings.model_fields, *TrainingSettings.model_fields} - {"tasks"}
        also = {"tasks_path", "output_name"}
        unknown = sorted(set(kwargs) - names - also - DECIDED_BY_DATA)
        if unknown:
            raise SettingsError(listed([f"{name}: is not a setting{nearest(name, names)}" for name in unknown]))
        self.output_name = kwargs.get("output_name", self.output_name)
        if "tasks_path" in kwargs and Path(kwargs["tasks_path"]).resolve() != self.tasks_path:
            raise SettingsError(f"tasks_path: must stay {self.tasks_path}, got {kwargs['tasks_path']}")
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in kwargs.items() if name in names
        }

    def _prepare(self) -> None:
        """Read, decode, build; the same steps that the job takes, on a folder."""
        data, training = self._data, self._training
        if training.baselines and str(training.pretrained).startswith("s3://"):
            raise SettingsError("pretrained: must be a file on this machine where there are baselines")
        with logs.shown(training.verbose), tempfile.TemporaryDirectory() as workdir:
            synced = sync(data.tasks, Path(workdir), belongs)
            files = {"ANSWERS": data.answers or f"{data.tasks}/{ANSWERS}", "PATH_REMOVE": data.path_remove}
            if isinstance(training.pretrained, str):
                files["PRETRAINED"] = training.pretrained
            paths = {name: fetch(at, Path(workdir), name) for name, at in files.items() if at is not None}
            removed = paths["PATH_REMOVE"][0] if "PATH_REMOVE" in paths else None
            self._digest = digest_of({"data": synced.digest()} | {name: digest for name, (_, digest) in paths.items()})
            dataset = read_dataset(synced.root, synced.digests, data, paths["ANSWERS"][0], removed, training.seed)
            log_dataset(dataset)
            decoded = load_images(dataset, synced.root, training, data.max_bad_images, None)
            weights = paths["PRETRAINED"][0] if "PRETRAINED" in paths else training.pretrained is True
            self._experiment = Experiment(*decoded, training, weights)
            self._trainer = self._experiment.trainer()

    @property
    def _ready(self) -> Trainer:
        assert self._trainer is not None  # __init__ has called setup
        return self._trainer

    # The names under which peerannot's object has its parts.

    @property
    def n_classes(self) -> int:
        return len(self._experiment.dataset.classes)

    @property
    def n_workers(self) -> int:
        """How many workers answered."""
        return len(self._experiment.dataset.workers)

    @property
    def n_epochs(self) -> int:
        return self._training.n_epochs

    @property
    def crowdlayer_net(self) -> CrowdModel:
        """The classifier below its crowd layer; has `.classifier` and `.confusion`."""
        return self._ready.learner.model

    @property
    def model(self) -> nn.Module:
        """The classifier."""
        return self._ready.classifier

    @property
    def criterion(self) -> CrowdLoss:
        return self._ready.learner.criterion

    @property
    def optimizer(self) -> Any:
        """Moves the classifier and, as its second group, the workers' matrices."""
        return self._ready.learner.optimizer

    optimizer2 = optimizer

    @property
    def scheduler(self) -> Any:
        return self._ready.learner.scheduler

    scheduler2 = scheduler

    @property
    def trainloader(self) -> CrowdLoader:
        return self._ready.train

    @property
    def valloader(self) -> ImageLoader:
        """Validation images with labels, -1 where the tasks are held out and no truth is known."""
        return self._loader(self._experiment.images.validation, self._ready.validation.labels)

    @property
    def testloader(self) -> ImageLoader | None:
        """None without test/."""
        test = self._experiment.dataset.test
        if test is None or self._experiment.images.test is None:
            return None
        return self._loader(self._experiment.images.test, torch.from_numpy(test.labels))

    def _loader(self, images: Rows, labels: Tensor | None) -> ImageLoader:
        size = EVALUATION_BATCHES * self._training.batch_size
        return ImageLoader(images, labels, size, self._ready.accelerator.device)

    def run(self, **kwargs: Any) -> dict[str, Any]:
        """Train, evaluate on the test set, write the results and the best model; on a GPU when there is one.

        Writes `<tasks_path>/results/<output_name>.json` and `<tasks_path>/best_models/<output_name>.pth`.

        Args:
            kwargs: settings that shall differ from those given before.

        Returns:
            What the results file holds.
        """
        self.setup(**kwargs)
        trainer = self._ready
        trainer.restart()
        place = Folder(self.tasks_path)
        with logs.shown(self._training.verbose) as log, tempfile.TemporaryDirectory() as folder:
            experiment, phases = self._experiment, self._phases
            outcome = compare(experiment, experiment.run(trainer, phases), trainer.watch, phases)
            settings = self._data.model_dump(mode="json") | self._training.model_dump(mode="json")
            provenance = Provenance(
                settings | {"output_name": self.output_name},
                self._digest,
                [device_name(trainer.accelerator.device)],
                has_small_stem(self.model),
                dict.fromkeys(
                    [*self._data.model_fields_set, *self._training.model_fields_set, "output_name"], "argument"
                ),
            )
            finished = Finished(experiment.dataset, experiment.images, outcome, provenance)
            results = publish(place, Path(folder), finished, phases)
            log.info(headline(results))
            log.info("results at %s", self.tasks_path / results_name(self.output_name))
        return results

    def run_epoch(
        self,
        model: CrowdModel,
        trainloader: CrowdLoader,
        criterion: CrowdLoss,
        optimizer: Mover,
        optimizer2: Mover,
        logger: dict[str, list[float]],
    ) -> dict[str, list[float]]:
        """One epoch; appends the mean loss per task to `logger["train_loss"]` and returns `logger`.

        `optimizer` and `optimizer2` may be the class's own, which are one, or two of the caller's.
        """
        progress = Progress(trainloader.epoch)
        moves = optimizer if optimizer2 is optimizer else _Both(optimizer, optimizer2)
        learner = self._ready.learner.lent(model, criterion, moves)
        loss = self._ready.train_epoch(learner, trainloader, progress)
        trainloader.epoch += 1
        logger.setdefault("train_loss", []).append(loss)
        return logger


class _Both:
    """Two optimisers as one: peerannot has one for the classifier and one for the workers' matrices."""

    def __init__(self, *optimizers: Mover) -> None:
        self._optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


def _checked(given: dict[str, Any]) -> tuple[DataSettings, TrainingSettings]:
    """The two groups of settings, all complaints at once."""
    complaints: list[str] = []
    made: list[Any] = []
    for group in (DataSettings, TrainingSettings):
        try:
            made.append(group(**{name: value for name, value in given.items() if name in group.model_fields}))
        except ValidationError as error:
            complaints += setting_complaints(error)
    if complaints:
        raise SettingsError(listed(complaints))
    return made[0], made[1]
