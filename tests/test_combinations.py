"""Any settings together: what holds of one holds of all, whichever others stand beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from crowdlayer.learning.guard import fallback
from crowdlayer.learning.progress import Best, Progress
from crowdlayer.learning.trainer import Trainer
from crowdlayer.settings import TrainingSettings
from tests.test_trainer import make, resumed, same

CHOICES: dict[str, list[Any]] = {
    "crowd_layer": ["matrix", "scale", "bias", "scale+bias", "scalar", "stochastic"],
    "crowd_start": ["identity", "dawid-skene"],
    "crowd_warmup": [0, 1, 2],
    "scale": [0.0, 0.01],
    "regularizer": ["identity", "pooled", "trace", "geo-w", "geo-f"],
    "loss_reduction": ["task", "answer"],
    "crowd_updates": ["auto", "dense", "rows"],
    "guard": [True, False],
    "select_by": ["loss", "calibrated_loss", "last"],
    "optimizer": ["sgd", "adam", "adamw"],
    "lr_crowd": [None, 0.003],
    "momentum": [0.9, 0.0],
    "decay": [5e-4, 0.0],
    "scheduler": ["multistep", "cosine", "none"],
    "milestones": [(1,), (2, 3)],
    "mixup": [0.0, 0.5],
    "ema": [0.0, 0.9],
    "freeze": [False, False, True],
    "mixed_precision": ["no", "no", "bf16"],
    "batch_size": [5, 8, 33],
    "dropout": [0.0, 0.3],
    "with_truth": [True, False],
}


def drawn(seed: int) -> dict[str, Any]:
    """Some of everything, and a small learning rate."""
    draw = random.Random(seed)
    return {"lr": 0.01} | {name: draw.choice(choices) for name, choices in CHOICES.items()}


SEEDS = [*range(24), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(24, 200))]


def agree(trainer: Trainer, best: Best, other: Trainer, others: Best) -> bool:
    figures = [(run.history.train_loss, run.history.val_loss, run.history.lr) for run in (trainer, other)]
    return same(best, others) and (best.epoch, best.score) == (others.epoch, others.score) and figures[0] == figures[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_kept_has_moved_is_what_was_chosen_and_does_not_depend_on_a_stop(seed: int) -> None:
    options = drawn(seed)
    trainer = make(**options)
    first = {name: weight.clone() for name, weight in trainer.classifier.state_dict().items()}
    best = trainer.fit()
    for name in ("fc.weight", *(() if options["freeze"] else ("features.0.weight",))):
        assert not torch.equal(best.classifier[name], first[name])
    trainer.load(best)
    _, score, _ = trainer.validate(trainer.predict(trainer.validation.images))
    assert score == pytest.approx(best.score, abs=1e-6)
    again = resumed(random.Random(seed).randrange(6), **options)  # three epochs of one step have that many places
    assert agree(trainer, best, again, again.fit())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_starts_again_is_a_run_of_the_settings_it_starts_again_with(seed: int) -> None:
    options = drawn(seed) | {"guard": True}
    again = make(**options)
    again.train_epoch(again.learner, again.train, Progress())
    again._collapse(1)
    settings = fallback(TrainingSettings(**again.settings.model_dump())).model_dump()
    fresh = make(**options | {name: settings[name] for name in CHOICES if name in settings} | {"guard": False})
    assert agree(again, again.fit(), fresh, fresh.fit())
