"""What the bench of quality compares: data sets, variants of the training, and the rules that pick an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Condition:
    """A data set, and how much of it a pair gets."""

    name: str
    size: int
    n_train: int | None = None
    per_task: int | None = None
    n_folds: int = 5
    budget: dict[str, Any] = field(default_factory=dict)


BUDGET = {"optimizer": "adam", "lr": 0.003, "scheduler": "cosine", "n_epochs": 30, "batch_size": 64}
"""What all variants have in common."""
CONDITIONS = {
    "labelme": Condition("labelme", 32),
    "cifar10n": Condition("cifar10n", 32, n_train=1000, budget={"n_epochs": 15}),
    "cifar10n-rand1": Condition("cifar10n", 32, n_train=2000, per_task=1, budget={"n_epochs": 15}),
    "spammers": Condition("spammers", 32, n_train=2000, budget={"n_epochs": 15}),
    "pairs": Condition("pairs", 32, n_train=2000, budget={"n_epochs": 15}),
    "unlike": Condition("unlike", 32, n_train=2000, budget={"n_epochs": 15}),
    "unlike-rand1": Condition("unlike", 32, n_train=2000, per_task=1, budget={"n_epochs": 15}),
    "few": Condition("few", 16, n_train=6000, budget={"n_epochs": 20}),
}
DS = {"crowd_start": "dawid-skene"}
STOCHASTIC = {"crowd_layer": "stochastic"}
THEIRS = "peerannot's class"
VARIANTS: dict[str, dict[str, Any]] = {
    "majority": {"labels": "majority"},
    "dawid-skene": {"labels": "dawid-skene"},
    "truth": {"labels": "truth"},
    "answers": {"labels": "answers"},
    "matrix": {},
    "peerannot": {"loss_reduction": "answer", "decay_crowd": 5e-4},
    "stochastic": STOCHASTIC,
    "stochastic ds": STOCHASTIC | DS,
    "matrix ds": DS,
    "scale": {"crowd_layer": "scale"},
    "bias": {"crowd_layer": "bias"},
    "scale+bias": {"crowd_layer": "scale+bias"},
    "scalar": {"crowd_layer": "scalar"},
    "stochastic ds held": STOCHASTIC | DS | {"crowd_warmup": 1000},
    "stochastic ds warmup": STOCHASTIC | DS | {"crowd_warmup": 10},
    "stochastic ds lr*10": STOCHASTIC | DS | {"lr_crowd": 0.03},
    "stochastic ds lr/10": STOCHASTIC | DS | {"lr_crowd": 0.0003},
    "stochastic ds lr*10 mixup": STOCHASTIC | DS | {"lr_crowd": 0.03, "mixup": 0.5},
    "stochastic ds lr*10 mixup=1": STOCHASTIC | DS | {"lr_crowd": 0.03, "mixup": 1.0},
    "stochastic ds lr*10 mixup=0.2": STOCHASTIC | DS | {"lr_crowd": 0.03, "mixup": 0.2},
    "stochastic ds mixup": STOCHASTIC | DS | {"mixup": 0.5},
    "stochastic ds lr*10 ema": STOCHASTIC | DS | {"lr_crowd": 0.03, "ema": 0.97},
    "majority mixup": {"labels": "majority", "mixup": 0.5},
    "truth mixup": {"labels": "truth", "mixup": 0.5},
    "answers mixup": {"labels": "answers", "mixup": 0.5},
    "majority ema": {"labels": "majority", "ema": 0.97},
    "matrix mixup": {"mixup": 0.5},
    "matrix ema": {"ema": 0.97},
    "matrix lr*10": {"lr_crowd": 0.03},
    "matrix lr/10": {"lr_crowd": 0.0003},
    "matrix ds mixup": DS | {"mixup": 0.5},
}
STRENGTHS = {
    "identity": (1e-4, 1e-3, 1e-2),
    "pooled": (1e-4, 1e-3, 1e-2),
    "trace": (1e-3, 1e-2, 1e-1),
    "geo-w": (1e-4, 1e-3, 1e-2),
    "geo-f": (1e-3, 1e-2, 1e-1),
}
"""Weak, sensible and strong, by the docstring of Regularizer."""
RECOMMENDED = "stochastic ds lr*10 mixup"
for _name, _scales in STRENGTHS.items():
    for _base, _scale in [*(("matrix", scale) for scale in _scales), (RECOMMENDED, _scales[1])]:
        VARIANTS[f"{_base} {_name}={_scale:g}"] = VARIANTS[_base] | {"regularizer": _name, "scale": _scale}
RULES: dict[str, Callable[[dict[str, list[float]]], int]] = {
    "loss": lambda seen: int(np.argmin(seen["val_loss"])),
    "accuracy": lambda seen: int(np.argmax(seen["val_accuracy"])),
    "calibrated_loss": lambda seen: int(np.argmin(seen["val_calibrated"])),
    "last": lambda seen: len(seen["val_loss"]) - 1,
    "no truth: loss": lambda seen: int(np.argmin(seen["held_loss"])),
    "no truth: calibrated_loss": lambda seen: int(np.argmin(seen["held_calibrated"])),
    "no truth: agreement": lambda seen: int(np.argmax(seen["held_agreement"])),
}
"""What picks the epoch (from 0): the first four by images with true labels, or by none; then by held-out answers."""
