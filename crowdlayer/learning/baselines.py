"""BASELINES: the same network and budget on labels to which the answers were aggregated before. Did the layer help?"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..answers import Answers, Ints, majority_vote
from . import metrics
from .aggregation import dawid_skene
from .devices import enough_memory, memory_for
from .experiment import Experiment, Outcome, Phases, left_free
from .features import on_features
from .further import Further
from .inference import LESS, matrices_of
from .trainer import Watch

log = logging.getLogger(__name__)


def compare(experiment: Experiment, outcome: Outcome, further: Further, watch: Watch, phases: Phases) -> Outcome:
    """Train each of BASELINES as the run itself was, but on one hard label per task; `outcome` with their figures.

    Same network, first weights, order of the tasks, epochs, learning rates and rule for the epoch; a label counts as
    often as its task has answers, so that a step is as long, and workers who are always right give no gain. Without
    val/ the epoch is chosen on the held-out tasks' aggregated labels. The figures, by the name of the baseline:
    `label_accuracy` (percent of the aggregated labels that are right, where truth is known), `best_epoch`,
    `val_accuracy`, `test_loss`, `test_accuracy`, `test_ece`, and `gain` (see `gain`); None for all where it was left
    out, as where LR is too high without the crowd layer, which damps it.

    Goes on from what is done `further`, and keeps it true, for `watch` to save.
    """
    figures: dict[str, dict[str, Any] | None] = {}
    for name in experiment.settings.baselines:
        work = partial(_figures, name, experiment, outcome, further, watch)
        with phases(f"baseline {name}"):
            figures[name] = further.train("baseline", name, work, watch)
    return replace(outcome, baselines=figures)


def aggregated(name: str, answers: Answers, n_classes: int) -> Ints:
    """(tasks,): a label per task from the answers alone."""
    if name == "majority":
        return majority_vote(answers, n_classes)
    return dawid_skene(answers, n_classes).posterior.argmax(1).numpy()


def gain(ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The points of accuracy that logits `ours` (images, classes) are better than `theirs`, with a 95 % interval.

    Paired over the images, of which some only one of them has right. The interval is Wald's with one such image more of
    each kind, which holds on few images too (Bonett & Price, "Adjusted Wald Confidence Interval for a Difference of
    Binomial Proportions Based on Paired Data", 2012). Of chance in the training it knows nothing: another seed moves it
    too.
    """
    mine, others = (logits.argmax(1) == labels for logits in (ours, theirs))
    n, won, lost = len(labels), int((mine & ~others).sum()), int((others & ~mine).sum())
    p, q = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = 1.96 * ((p + q - (p - q) ** 2) / (n + 2)) ** 0.5
    low, high = max(p - q - half, -1.0), min(p - q + half, 1.0)
    return {"points": 100 * (won - lost) / n, "low": 100 * low, "high": 100 * high}


def _figures(name: str, experiment: Experiment, outcome: Outcome, further: Further, watch: Watch) -> dict[str, Any]:
    dataset, images, settings = experiment.dataset, experiment.images, experiment.settings
    n_classes, n = len(dataset.classes), len(dataset.train.names)
    with memory_for(matrices_of(dataset)[0], LESS):
        label = aggregated(name, dataset.answers, n_classes)
    known = dataset.truth >= 0
    held = torch.from_numpy(label[n:] if dataset.val is None else dataset.val.labels)
    plain = {"crowd_layer": "scalar", "crowd_start": "identity", "lr_crowd": None, "scale": 0.0, "guard": False}
    with enough_memory(settings):
        trainer = experiment.trainer_of(settings.model_copy(update=plain), held, None)
        trainer.learn_labels(label[:n])
        trainer.watch = watch
        log.info("the same network on its labels")
        further.go_on(trainer)
        with on_features(trainer, experiment.folder, experiment.features, left_free(settings, dataset)):
            best = trainer.fit()
        trainer.load(best)
        logits = None if images.test is None else trainer.predict(images.test)
    figures: dict[str, Any] = {
        "label_accuracy": 100 * float((label == dataset.truth)[known].mean()) if known.any() else None,
        "best_epoch": best.epoch,
        "val_accuracy": best.figures["val_accuracy"] if dataset.val is not None else None,
        "test_loss": None,
        "test_accuracy": None,
        "test_ece": None,
        "gain": None,
    }
    if dataset.test is not None and logits is not None and outcome.predictions.test is not None:
        labels = torch.from_numpy(dataset.test.labels)
        evaluation = metrics.evaluation(logits, labels, "test")
        figures |= {key: evaluation[key] for key in ("test_loss", "test_accuracy")}
        figures["test_ece"] = metrics.expected_calibration_error(logits, labels)
        figures["gain"] = gain(outcome.predictions.test, logits, labels)
        log.info(
            "test accuracy %.1f %%; the crowd layer has %+.1f (95 %%: %+.1f to %+.1f)",
            figures["test_accuracy"], *figures["gain"].values(),
        )  # fmt: skip
    return figures
