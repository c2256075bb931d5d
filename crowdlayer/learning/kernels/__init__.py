"""CUDA kernels of our own, in bfloat16 and channels last, for recorded steps.

CUDA's runtime compiler, which torch brings along, makes them when they are first wanted: no compiler is needed on the
machine. Where that cannot be, torch's kernels do as well.
"""

from __future__ import annotations

from .batch_norm import BatchNorm, normable
from .crowd import crowd_loss, of_classes
from .making import available, fit
from .patches import Window, patches, taken
from .pooling import MaxPool, poolable
from .sgd import laid_out_as, sgd

__all__ = [
    "BatchNorm", "MaxPool", "Window", "available", "crowd_loss", "fit", "laid_out_as", "normable", "of_classes",
    "patches", "poolable", "sgd", "taken",
]  # fmt: skip
