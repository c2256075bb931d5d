"""A data set on this machine → a chosen model and its figures: the way that the job and the class share."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..answers import Answers, Ints
from ..data.dataset import CrowdImages, Dataset, LabelledImages, summary, without_broken
from ..data.decoding import Decoded, decode_all
from ..data.images import CrowdLoader, Rows, chosen, resident
from ..errors import SettingsError
from ..machine.processes import Processes
from ..settings import TrainingSettings
from ..storage.files import SPARE
from . import advice, metrics
from .classifier import build_classifier, n_weights
from .crowd_layer import WORKER_MODELS, log_likelihood
from .devices import enough_memory, make_accelerator, memory_for
from .features import on_features
from .inference import LESS, Inferred, Predictions, infer, matrices_of
from .progress import Best, History
from .trainer import Trainer, Validation

log = logging.getLogger(__name__)


@dataclass
class Phases:
    """Seconds per phase of a run, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)


@dataclass(frozen=True)
class Images:
    """The decoded images, (n, size, size, 3) uint8 each, in the order of the data set's parts."""

    train: Decoded
    validation: Decoded
    test: Decoded | None


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    history: History
    best: Best
    confusion: Tensor
    """The matrices of the chosen epoch, (n_workers, true, answered), float32."""
    figures: dict[str, float]
    """The seed's figures of val (of the chosen epoch) and test, for those that exist; and `temperature`."""
    predictions: Predictions
    inferred: Inferred
    crowd_layer: str
    """The worker model of the chosen epoch: CROWD_LAYER, or the guard's."""
    collapsed_since: int | None
    folds: int = 0
    """How many networks judged the labels that have not seen their answers; 0 where it is the run's own."""
    baselines: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """The figures of BASELINES, by name."""


def load_images(
    dataset: Dataset,
    root: Path,
    settings: TrainingSettings,
    max_bad_images: float,
    folder: Path | None,
    digests: Mapping[str, str] | None = None,
) -> tuple[Dataset, Images]:
    """Decode every image once, to IMG_SIZE; the arrays lie in `folder`, by default under TMPDIR.

    Args:
        digests: the files' SHA-256 by name; with these the arrays are kept, and found by other processes and starts.

    Returns:
        The data set without the images that are broken, and the others.
    """
    threads = Processes.joined().cpus() if settings.num_workers == "auto" else settings.num_workers
    at_most = math.inf if settings.max_cache == "auto" else settings.max_cache * 1e9
    spare = left_free(settings, dataset)
    broken: dict[str, str] = {}

    def decoded(split: str, *parts: CrowdImages | LabelledImages) -> list[Decoded]:
        """The images of the parts of a split: the file does not depend on which tasks are held out."""
        names = sorted(name for part in parts for name in part.names)
        kept = None if digests is None else (split, [digests[name] for name in names])
        images, bad = decode_all(root, names, settings.img_size, threads, folder, kept, at_most, spare)
        broken.update(bad)
        row = {name: row for row, name in enumerate(name for name in names if name not in bad)}
        rows = [[row[name] for name in part.names if name in row] for part in parts]
        return [images.chosen(torch.tensor(chosen, dtype=torch.int64)) for chosen in rows]

    train, *validation = decoded("train", *dataset.crowd)
    if dataset.val is not None:
        validation = decoded("val", dataset.val)
    test = None if dataset.test is None else decoded("test", dataset.test)[0]
    return without_broken(dataset, broken, max_bad_images), Images(train, validation[0], test)


def checkpoints_size(settings: TrainingSettings, dataset: Dataset) -> int:
    """Bytes that a run's checkpoints may take on its disk: images and features take what these leave.

    Three of them: being written, waiting, on their way. Each may have the weights, the best ones, two moments, of which
    a frozen network has none, and those that EMA averages; and the same of a fold, with what the others have said, or
    of a baseline, which has no matrices to speak of.
    """
    averaged, folds, n_classes = settings.ema > 0, settings.folds > 0, len(dataset.classes)
    weights = ((2 if settings.freeze else 4) + averaged) * n_weights(settings.model)
    matrices = (4 + averaged) * len(dataset.workers) * n_classes**2
    said = len(dataset.train.names) * n_classes if folds else 0
    return 3 * 4 * ((2 if folds or settings.baselines else 1) * weights + (2 if folds else 1) * matrices + said)


def left_free(settings: TrainingSettings, dataset: Dataset) -> int:
    """Bytes of the disk that a run's images and features leave to others."""
    return SPARE + checkpoints_size(settings, dataset)


@dataclass(frozen=True)
class Experiment:
    """What is trained on what: a data set with its images decoded, the settings, the first weights.

    `pretrained`: true for torchvision's default weights, or the file of a state dict. `folder`: where arrays may lie
    that are computed on the way, by default under TMPDIR.
    """

    dataset: Dataset
    images: Images
    settings: TrainingSettings
    pretrained: bool | Path
    folder: Path | None = None
    features: dict[str, Rows] = field(default_factory=dict)
    """What a frozen network says to the images, once it was computed: it is the same in every trainer."""

    def trainer(self) -> Trainer:
        """The network and everything that moves it, seeded."""
        labels = None if self.dataset.val is None else torch.from_numpy(self.dataset.val.labels)
        held_out = self.dataset.held_out
        return self.trainer_of(self.settings, labels, None if held_out is None else held_out.answers)

    def trainer_of(self, settings: TrainingSettings, labels: Tensor | None, answers: Answers | None) -> Trainer:
        """The trainer for other `settings` of the training, and other labels (images,) or answers to choose by.

        The same settings, the same start.
        """
        with enough_memory(settings):
            accelerator = make_accelerator(settings)
            torch.manual_seed(settings.seed)
            n_classes, train = len(self.dataset.classes), self.dataset.train.answers
            classifier = build_classifier(
                settings.model, n_classes, settings.img_size, self.pretrained, settings.freeze, settings.small_images
            )
            loader = CrowdLoader(
                resident(self.images.train, accelerator.device),
                train,
                settings.batch_size,
                settings.seed,
                settings.data_augmentation,
                accelerator.device,
                Processes.joined(),
                self.images.train.aspect,
            )
            validation = Validation(resident(self.images.validation, accelerator.device), labels, answers)
            return Trainer(settings, accelerator, classifier, n_classes, loader, validation)

    def of_tasks(self, rows: Ints) -> Experiment:
        """The same, but with these of the tasks (n,) alone to be trained on."""
        at = torch.from_numpy(rows)
        dataset = replace(self.dataset, train=self.dataset.train.subset(rows))
        images = replace(self.images, train=self.images.train.chosen(at))
        features = {name: chosen(some, at) if name == "train" else some for name, some in self.features.items()}
        return replace(self, dataset=dataset, images=images, features=features)

    def run(self, trainer: Trainer, phases: Phases) -> Outcome:
        """Train, then evaluate the chosen epoch on test/ and on the tasks with answers."""
        dataset, images, settings = self.dataset, self.images, trainer.settings
        _advise(advice.before(dataset, settings))
        with enough_memory(settings), ExitStack() as frozen:
            with phases("train"):
                frozen.enter_context(on_features(trainer, self.folder, self.features, left_free(settings, dataset)))
                best = trainer.fit()
            _advise(advice.after(trainer.history, best.epoch, trainer.settings))
            with phases("evaluate"):
                trainer.load(best)
                seen = trainer.predict(trainer.train.dataset), trainer.predict(trainer.validation.images)
        with phases("evaluate"), enough_memory(settings):
            predictions = Predictions(*seen, None if images.test is None else trainer.predict(images.test))
        must_be_finite(vars(predictions), trainer.accelerator.mixed_precision)
        with phases("evaluate"), memory_for(matrices_of(dataset)[0], LESS):
            test = predictions.test
            figures = dict(best.figures)
            if dataset.test is not None and test is not None:
                labels = torch.from_numpy(dataset.test.labels)
                figures |= metrics.evaluation(test, labels, "test")
                figures["test_ece"] = metrics.expected_calibration_error(test, labels)
            crowd_layer = trainer.learner.crowd_layer
            confusion = crowd_layer.matrices().detach().float().cpu()
            likelihood = log_likelihood(confusion, crowd_layer.likelihood)
            figures["temperature"], inferred = infer(dataset, predictions, likelihood)
        name, since = trainer.settings.crowd_layer, trainer.collapsed_since
        return Outcome(trainer.history, best, confusion, figures, predictions, inferred, name, since)


def judged(dataset: Dataset, outcome: Outcome, unseen: Tensor) -> Outcome:
    """The outcome, its labels and workers inferred anew with `unseen` (see `Predictions`)."""
    predictions = replace(outcome.predictions, unseen=unseen)
    with memory_for(matrices_of(dataset)[0], LESS):
        likelihood = log_likelihood(outcome.confusion, WORKER_MODELS[outcome.crowd_layer].likelihood)
        return replace(outcome, predictions=predictions, inferred=infer(dataset, predictions, likelihood)[1])


def must_be_finite(predictions: Mapping[str, Tensor | None], precision: str) -> None:
    """Refuse logits, by what they are of, that are no numbers: nothing that follows would be one.

    Raises:
        SettingsError: with how many images they are of.
    """
    for part, logits in predictions.items():
        wrong = 0 if logits is None else int((~logits.isfinite().all(1)).sum())
        if wrong:
            raise SettingsError(
                f"MIXED_PRECISION: logits must be finite for every image, for {wrong} of {part} they are not in "
                f"precision {precision}; consider no, or a lower LR"
            )


def _advise(warnings: Iterable[str]) -> None:
    for warning in warnings if Processes.joined().index == 0 else ():
        log.warning("%s", warning)


def log_dataset(dataset: Dataset) -> None:
    """One line on what was found."""
    counts = summary(dataset)
    test = 0 if dataset.test is None else len(dataset.test.names)
    chosen_on = f"{len(dataset.val.names)} validation" if dataset.val is not None else "no validation"
    log.info(
        "data set %s: %d tasks with %d answers of %d workers, %d classes; %s and %d test images",
        dataset.name, counts["n_tasks"], counts["n_answers"], counts["n_workers"], counts["n_classes"],
        chosen_on, test, extra=counts,
    )  # fmt: skip
