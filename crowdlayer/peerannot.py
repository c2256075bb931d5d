"""The class of peerannot on our trainer: a notebook written for it runs after changing the import line."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError, field_validator
from torch import Tensor, nn

from . import logs
from .data.images import CrowdLoader, ImageLoader, Rows
from .errors import SettingsError, listed
from .inputs import probe, read_inputs
from .learning.baselines import compare
from .learning.classifier import has_small_stem
from .learning.crowd_model import CrowdLoss, CrowdModel
from .learning.devices import device_name
from .learning.experiment import Experiment, Phases, load_images
from .learning.folds import cross_fit
from .learning.further import Further
from .learning.optimization import Both, Matrices, MatricesSchedule, Mover
from .learning.progress import Progress
from .learning.trainer import EVALUATION_BATCHES
from .report.publishing import publish
from .report.results import Finished, Provenance, results_name, tell
from .settings import FileName, RunSettings, is_archive, nearest, quoted, setting_complaints
from .storage.places import Folder
from .storage.workdir import working_folder

DECIDED_BY_DATA = frozenset({"n_workers", "labels", "metadata_path", "n_params", "dataset", "strategy"})
"""What peerannot's command line hands over beside the settings; the data decide."""


class Arguments(RunSettings):
    """What the class takes."""

    output_name: FileName = "crowdlayer"

    @field_validator("answers", "path_remove", "pretrained", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        if isinstance(value, Mapping):
            raise ValueError("must be the path of a file")
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("answers", "path_remove", "pretrained")
    @classmethod
    def _as_absolute(cls, value: object) -> object:
        """What was meant here: a notebook may go to another folder."""
        return str(Path(value).absolute()) if isinstance(value, str) and not value.startswith("s3://") else value


class Crowdlayer:
    """Learn a classifier from the answers of a crowd (Rodrigues & Pereira, AAAI 2018).

    Minimises, for the classifier's scores z_i and a matrix π^(j) per worker,

        L = 1/n_task Σ_i Σ_{j ∈ A(x_i)} CE(h_i^(j), y_i^(j)),   h_i^(j) = σ(π^(j) σ(z_i)).

    Args:
        tasks_path: the folder with train/, and optionally val/, test/ and metadata.json, or an archive of it.
        answers: the path of the JSON file {task: {worker: label}}; None for `<tasks_path>/answers.json`.
        model: a classification model of torchvision.models, by name.
        n_classes: the number of classes; must agree with the data.
        optimizer: "sgd", "adam" or "adamw", any case.
        n_epochs: how often every task is seen.
        scale: the weight of the regulariser in the loss.
        verbose: log every epoch.
        pretrained: start from torchvision's weights, or from a state dict's file.
        output_name: the prefix of the files written.
        kwargs: any other setting of the data set and of the training, by its name in small letters, as
            crowdlayer/docs/settings.md has them: batch_size, lr, scheduler, img_size, seed, path_remove …

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
        answers: str | Path | None,
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
        self._settings: Arguments
        if "://" in str(tasks_path):
            raise SettingsError(
                f"tasks_path: must be a folder or archive on this machine, got {quoted(str(tasks_path))}"
            )
        self.tasks_path = Path(tasks_path).resolve()
        given: dict[str, Any] = {
            "tasks": str(self.tasks_path),
            "answers": answers,
            "model": model,
            "n_classes": n_classes,
            "optimizer": optimizer,
            "n_epochs": n_epochs,
            "scale": scale,
            "verbose": verbose,
            "pretrained": pretrained,
            "output_name": output_name,
        }
        self._prepare(_checked(given | self._known(kwargs)))

    def setup(self, **kwargs: Any) -> None:
        """Make the training, validation and test loaders; with settings that differ, the network anew too."""
        settings = _checked(self._settings.model_dump(exclude_unset=True) | self._known(kwargs))
        if settings.model_copy(update={"output_name": self.output_name}) != self._settings:
            self._prepare(settings)
        self._settings = settings

    def _known(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` without what the data decide; `tasks_path` may come again."""
        names = Arguments.model_fields.keys() - {"tasks"}
        if unknown := sorted(kwargs.keys() - names - DECIDED_BY_DATA - {"tasks_path"}):
            raise SettingsError(listed([f"{name}: is not a setting{nearest(name, names)}" for name in unknown]))
        if "tasks_path" in kwargs and Path(kwargs["tasks_path"]).resolve() != self.tasks_path:
            raise SettingsError(f"tasks_path: must stay {self.tasks_path}, got {kwargs['tasks_path']}")
        return {name: value for name, value in kwargs.items() if name in names}

    def _prepare(self, settings: Arguments) -> None:
        """Read, decode, build; the same steps that the job takes. What fails on the way leaves all as it was."""
        with logs.shown(settings.verbose), ExitStack() as folder:
            inputs = read_inputs(settings, folder.enter_context(working_folder(None)), Phases())
            decoded = load_images(inputs.dataset, inputs.synced.root, settings, settings.max_bad_images, None)
            experiment = Experiment(*decoded, settings, inputs.weights or settings.pretrained is True)
            trainer = experiment.trainer()
            kept = _Kept(folder.pop_all())  # later images are decoded from there that are not held, and weights read
        self._settings, self._digest, self._experiment, self._trainer = settings, inputs.digest, experiment, trainer
        self._folder, self._begun = kept, False

    # The names under which peerannot's object has its parts.

    @property
    def output_name(self) -> str:
        return self._settings.output_name

    @property
    def n_classes(self) -> int:
        return len(self._experiment.dataset.classes)

    @property
    def n_workers(self) -> int:
        """How many workers answered."""
        return len(self._experiment.dataset.workers)

    @property
    def n_epochs(self) -> int:
        return self._settings.n_epochs

    @property
    def crowdlayer_net(self) -> CrowdModel:
        """The classifier below its crowd layer; has `.classifier` and `.confusion`."""
        return self._trainer.learner.model

    @property
    def model(self) -> nn.Module:
        """The classifier."""
        return self._trainer.classifier

    @property
    def criterion(self) -> CrowdLoss:
        return self._trainer.learner.criterion

    @property
    def optimizer(self) -> Any:
        """Moves the classifier and, as its second group, the workers' matrices."""
        return self._trainer.learner.optimizer

    @property
    def optimizer2(self) -> Matrices:
        """The workers' matrices alone, whose rate may be set here; `optimizer` moves them."""
        return Matrices(self.optimizer)

    @property
    def scheduler(self) -> Any:
        return self._trainer.learner.scheduler

    @property
    def scheduler2(self) -> MatricesSchedule:
        return MatricesSchedule(self.optimizer2)

    @property
    def trainloader(self) -> CrowdLoader:
        return self._trainer.train

    @property
    def valloader(self) -> ImageLoader:
        """Validation images with labels, -1 where the tasks are held out and no truth is known."""
        return self._loader(self._experiment.images.validation, self._trainer.validation.labels)

    @property
    def testloader(self) -> ImageLoader | None:
        """None without test/."""
        test = self._experiment.dataset.test
        if test is None or self._experiment.images.test is None:
            return None
        return self._loader(self._experiment.images.test, torch.from_numpy(test.labels))

    def _loader(self, images: Rows, labels: Tensor | None) -> ImageLoader:
        return ImageLoader(images, labels, EVALUATION_BATCHES * self._settings.batch_size, self.trainloader.device)

    def run(self, **kwargs: Any) -> dict[str, Any]:
        """Train, evaluate on the test set, write the results and the best model; on a GPU when there is one.

        Writes `<tasks_path>/results/<output_name>.json` and `<tasks_path>/best_models/<output_name>.pth`, of
        an archive beside it. A second run begins anew, like the first.

        Args:
            kwargs: settings that shall differ from those given before.

        Returns:
            What the results file holds.
        """
        self.setup(**kwargs)
        if self._begun:
            self._prepare(self._settings)
        place = Folder(self.tasks_path.parent if is_archive(str(self.tasks_path)) else self.tasks_path)
        settings, experiment, trainer, phases = self._settings, self._experiment, self._trainer, Phases()
        with logs.shown(settings.verbose) as log, tempfile.TemporaryDirectory() as folder:
            probe(place, settings.output_name, Path(folder))
            self._begun = True
            further, outcome = Further(), experiment.run(trainer, phases)
            outcome = cross_fit(experiment, outcome, further, trainer.watch, phases)
            outcome = compare(experiment, outcome, further, trainer.watch, phases)
            provenance = Provenance(
                settings.model_dump(mode="json"),
                self._digest,
                [device_name(trainer.accelerator.device)],
                has_small_stem(self.model),
                dict.fromkeys(settings.model_fields_set, "argument"),
            )
            finished = Finished(experiment.dataset, experiment.images, outcome, provenance)
            results = publish(place, Path(folder), finished, phases)
            tell(results, settings)
            log.info("results at %s/%s", place.location, results_name(settings.output_name))
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

        `optimizer` and `optimizer2` may be the class's own, or two of the caller's.

        Raises:
            ValueError: only the second one is the class's, which moves nothing without the first.
        """
        if isinstance(optimizer2, Matrices) and optimizer2.whole is not optimizer:
            raise ValueError("optimizer2: must be the caller's own where optimizer is, got the class's")
        progress = Progress(trainloader.epoch)
        one = isinstance(optimizer2, Matrices) or optimizer2 is optimizer
        moves = optimizer if one else Both(optimizer, optimizer2)
        learner = self._trainer.learner.lent(model, criterion, moves)
        loss = self._trainer.train_epoch(learner, trainloader, progress)
        trainloader.epoch += 1
        logger.setdefault("train_loss", []).append(loss)
        return logger


class _Kept:
    """Has a folder until nobody has this any more; a deep copy of it is the same."""

    def __init__(self, folder: ExitStack) -> None:
        weakref.finalize(self, folder.close)

    def __deepcopy__(self, memo: object) -> _Kept:
        return self


def _checked(given: dict[str, Any]) -> Arguments:
    """The arguments, or all complaints at once."""
    try:
        return Arguments(**given)
    except ValidationError as error:
        raise SettingsError(listed(setting_complaints(error))) from error
