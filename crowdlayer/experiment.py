"""A data set on this machine → a chosen model and its figures: the way that the job and the class share."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .answers import Answers, majority_vote
from .classifier import build_classifier
from .crowd_layer import WORKER_MODELS, log_likelihood, posterior
from .dataset import Dataset, summary, without_broken
from .devices import enough_memory, make_accelerator, precision
from .export import Format, check_export
from .images import CrowdLoader, decode_all
from .processes import Processes
from .settings import TrainingSettings
from .trainer import Best, History, Trainer, Validation

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

    train: Tensor
    validation: Tensor
    test: Tensor | None


@dataclass(frozen=True)
class Inferred:
    """What classifier and answers together say about every task with answers, those trained on first.

    `posterior` (tasks, classes) float64; `majority` (tasks,) the majority vote.
    """

    posterior: Tensor
    majority: Tensor


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    history: History
    best: Best
    figures: dict[str, float]
    """The seed's figures of val (of the chosen epoch) and test, for those that exist."""
    inferred: Inferred


def load_images(
    dataset: Dataset, root: Path, settings: TrainingSettings, max_bad_images: float, folder: Path | None
) -> tuple[Dataset, Images]:
    """Decode every image once, to IMG_SIZE; the arrays lie in `folder`, by default under TMPDIR.

    Returns the data set without the images that are broken, and the others.
    """
    threads = (os.cpu_count() or 1) if settings.num_workers == "auto" else settings.num_workers
    validation = dataset.val or dataset.held_out
    assert validation is not None  # one of the two is there
    broken: dict[str, str] = {}
    decoded: list[Tensor | None] = []
    for part in (dataset.train, validation, dataset.test):
        images, bad = (None, {}) if part is None else decode_all(root, part.names, settings.img_size, threads, folder)
        decoded.append(images)
        broken |= bad
    train, val, test = decoded
    assert train is not None
    assert val is not None
    return without_broken(dataset, broken, max_bad_images), Images(train, val, test)


def check_possible(settings: TrainingSettings, formats: Sequence[Format] = ()) -> None:
    """Refuse settings that no data set can make work, before anything is downloaded.

    Raises:
        SettingsError: the model cannot take such images or has no such stem, the device has no such precision, the
            model cannot be exported in one of `formats`.
    """
    precision(settings)
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(settings.model, 2, settings.img_size, False, settings.freeze, settings.small_images)
        check_export(model, settings.img_size, formats)


def make_trainer(dataset: Dataset, images: Images, settings: TrainingSettings, pretrained: bool | Path) -> Trainer:
    """The network and everything that moves it, seeded."""
    with enough_memory(settings):
        return _make_trainer(dataset, images, settings, pretrained)


def _make_trainer(dataset: Dataset, images: Images, settings: TrainingSettings, pretrained: bool | Path) -> Trainer:
    accelerator = make_accelerator(settings)
    torch.manual_seed(settings.seed)
    classifier = build_classifier(
        settings.model, len(dataset.classes), settings.img_size, pretrained, settings.freeze, settings.small_images
    )
    loader = CrowdLoader(
        images.train,
        dataset.train.answers,
        settings.batch_size,
        settings.seed,
        settings.data_augmentation,
        accelerator.device,
        Processes.joined(),
    )
    validation = Validation(
        images.validation,
        None if dataset.val is None else torch.from_numpy(dataset.val.labels),
        None if dataset.held_out is None else dataset.held_out.answers,
    )
    return Trainer(settings, accelerator, classifier, len(dataset.classes), loader, len(dataset.workers), validation)


def run(dataset: Dataset, images: Images, trainer: Trainer, phases: Phases) -> Outcome:
    """Train, then evaluate the chosen epoch on test/ and on the tasks with answers."""
    with phases("train"), enough_memory(trainer.settings):
        best = trainer.fit()
    with phases("evaluate"), enough_memory(trainer.settings):
        trainer.load(best)
        figures = dict(best.figures)
        if dataset.test is not None and images.test is not None:
            logits, labels = trainer.predict(images.test), torch.from_numpy(dataset.test.labels)
            figures |= metrics.evaluation(logits, labels, "test")
            figures["test_ece"] = metrics.expected_calibration_error(logits, labels)
        inferred = infer(dataset, images, trainer, best)
    return Outcome(trainer.history, best, figures, inferred)


def infer(dataset: Dataset, images: Images, trainer: Trainer, best: Best) -> Inferred:
    """The posterior and the majority vote of every task with answers."""
    likelihood = log_likelihood(best.confusion, WORKER_MODELS[trainer.settings.crowd_layer].likelihood)
    held = [] if dataset.held_out is None else [images.validation]
    parts = []
    for part, pixels in zip(dataset.crowd, [images.train, *held], strict=True):
        task, worker, label = _tensors(part.answers)
        parts.append(posterior(trainer.predict(pixels), likelihood, task, worker, label))
    votes = [majority_vote(part.answers, len(dataset.classes)) for part in dataset.crowd]
    return Inferred(torch.cat(parts), torch.from_numpy(np.concatenate(votes)))


def crowd_figures(dataset: Dataset, inferred: Inferred) -> dict[str, float | None]:
    """Percent right, of the tasks whose true class is known from train/'s folders; None where none is.

    `train_accuracy` of the inferred labels, `majority_vote_accuracy` of the majority's, `answer_accuracy` of single
    answers; and `majority_vote_agreement`, the percent of all tasks where the inferred label is the majority's.
    """
    truth = torch.from_numpy(np.concatenate([part.truth for part in dataset.crowd]))
    known = truth >= 0
    label = inferred.posterior.argmax(1)
    right = [
        (part.answers.label == part.truth[part.answers.task])[part.truth[part.answers.task] >= 0]
        for part in dataset.crowd
    ]
    answers = np.concatenate(right)
    return {
        "train_accuracy": metrics.accuracy(label[known], truth[known]) if known.any() else None,
        "majority_vote_accuracy": metrics.accuracy(inferred.majority[known], truth[known]) if known.any() else None,
        "answer_accuracy": 100 * float(answers.mean()) if len(answers) else None,
        "majority_vote_agreement": metrics.accuracy(label, inferred.majority),
    }


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


def _tensors(answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(answers.task), torch.from_numpy(answers.worker), torch.from_numpy(answers.label)
