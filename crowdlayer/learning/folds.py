"""FOLDS: labels and workers judged by classifiers that have not seen the answers.

The run's own has learnt the answers that it is combined with, the more so the fewer a task has: where it has one,
nothing contradicts it. So the tasks are shared out, and those of each fold are judged by a network that was trained on
all others (cross-validated, as Northcutt et al., "Confident Learning", JAIR 2021, find wrong labels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..answers import Ints
from .devices import enough_memory, memory_for
from .experiment import Experiment, Outcome, Phases, judged, left_free, must_be_finite
from .features import on_features
from .further import Further
from .inference import LESS, Predictions, matrices_of, temperatures
from .trainer import Watch


def shared_out(n_tasks: int, folds: int, seed: int) -> Ints:
    """(tasks,): the fold of each, 0 … folds-1, as equal in size as can be."""
    return np.random.default_rng((seed, folds)).permutation(n_tasks) % folds


def cross_fit(experiment: Experiment, outcome: Outcome, further: Further, watch: Watch, phases: Phases) -> Outcome:
    """Train once for each of FOLDS as the run itself was; `outcome` with labels and workers judged by these networks.

    Each has the same first weights, settings and rule for the epoch, and what chooses the epoch; its tasks are all but
    the fold's. The model, its epoch, its temperature and its figures on val/ and test/ stay the run's own. Where a fold
    was left out, the outcome stays what it is.

    Goes on from what is done `further`, and keeps it true, for `watch` to save.
    """
    n = len(experiment.dataset.train.names)
    folds = min(experiment.settings.folds, n)  # broken images have left since it was asked for
    if folds == 0:
        return outcome
    fold = shared_out(n, folds, experiment.settings.seed)
    logits = torch.empty(n, len(experiment.dataset.classes))
    with phases("folds"):
        for k in range(folds):
            work: Callable[[], Tensor] = partial(_logits, experiment, fold != k, further, watch)
            found = further.train("fold", f"{k + 1} of {folds}", work, watch)
            if found is None:
                return outcome
            logits[torch.from_numpy(fold == k)] = found
        return replace(judged(experiment.dataset, outcome, logits), folds=folds)


def _logits(experiment: Experiment, seen: np.ndarray, further: Further, watch: Watch) -> Tensor:
    """(tasks that are not `seen`, classes): what a network says to them that is trained on the others, calibrated."""
    with enough_memory(experiment.settings):
        some = experiment.of_tasks(np.flatnonzero(seen))
        trainer = some.trainer()
        trainer.watch = watch
        further.go_on(trainer)
        with on_features(trainer, some.folder, some.features, left_free(some.settings, experiment.dataset)):
            best = trainer.fit()
            trainer.load(best)
            known = trainer.predict(trainer.train.dataset), trainer.predict(trainer.validation.images)
        logits = trainer.predict(experiment.images.train.chosen(torch.from_numpy(np.flatnonzero(~seen))))
    predictions = Predictions(*known, None, logits)
    must_be_finite(vars(predictions), trainer.accelerator.mixed_precision)
    with memory_for(matrices_of(some.dataset)[0], LESS):
        likelihood = trainer.learner.crowd_layer.answer_log_likelihood().detach().float().cpu()
        return logits / temperatures(some.dataset, predictions, likelihood)[0]
