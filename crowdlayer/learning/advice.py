"""What a data set, its settings and a finished run give reason to warn about, each with the setting that helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from ..data.dataset import Dataset
from ..errors import few
from ..settings import TrainingSettings
from .progress import History
from .selection import others

FEW_HELD_OUT = 50
"""Held-out tasks below which the choice of the epoch is mostly luck: a rate has a standard error of 7 % at 50."""
FEW_AT_ONCE = 8
"""Images of which, and of fewer, batch norm's statistics are mostly chance."""
FEW_IMAGES = 5000
"""Below so many images a large network from scratch seldom comes near one that starts from ImageNet's weights."""
FEW_TASKS = 8
"""A step of so many is small enough for any data set."""
LARGE_IMAGES = 96
"""Pixels from which torchvision's weights, trained at 224, are of use."""


def before(dataset: Dataset, settings: TrainingSettings) -> Iterator[str]:
    """Of the data set and the settings, before an hour is spent on them; nothing of a trial of an epoch or two."""
    if settings.n_epochs < 3:
        return
    n = len(dataset.train.names)
    if settings.scheduler == "multistep" and min(settings.milestones, default=0) >= settings.n_epochs:
        yield (
            f"MILESTONES={_list(settings.milestones)}: none comes within N_EPOCHS={settings.n_epochs}, LR never falls: "
            f"consider MILESTONES={max(settings.n_epochs // 2, 1)} or SCHEDULER=cosine"
        )
    if settings.batch_size > max(n // 4, FEW_TASKS):
        steps = -(-n // settings.batch_size)
        yield (
            f"BATCH_SIZE={settings.batch_size}: an epoch of {n} tasks has {steps} step{'s' if steps > 1 else ''}: "
            f"consider BATCH_SIZE={max(n // 20, FEW_TASKS)}"
        )
    if settings.pretrained is False and n < FEW_IMAGES and settings.img_size >= LARGE_IMAGES:
        yield f"PRETRAINED=false: {n} images are few to train {settings.model} from scratch: consider PRETRAINED=true"
    single = int((np.diff(dataset.train.answers.starts_at) == 1).sum())
    if 2 * single > n and settings.folds == 0:
        yield (
            f"{single} of {n} tasks have one answer: nothing but the classifier, which learns it, can bear it out, "
            f"so that their scores in labels.csv and the qualities in workers.csv say little: "
            f"consider FOLDS=5, or several answers for each task"
        )
    if dataset.held_out is not None and len(dataset.held_out.names) < FEW_HELD_OUT:
        yield (
            f"the epoch is chosen by {len(dataset.held_out.names)} held-out tasks, which are few: "
            f"add val/, or raise VAL_FRACTION"
        )
    if dataset.held_out is not None and settings.select_by != "last":
        yield (
            f"SELECT_BY={settings.select_by}: matrices fit the answers they have, and held-out answers then choose too "
            f"early an epoch: consider SELECT_BY=last with SCHEDULER=cosine"
        )
    if settings.scale == 0 and settings.regularizer != TrainingSettings.model_fields["regularizer"].default:
        yield f"REGULARIZER={settings.regularizer}: weighs nothing with SCALE=0: consider SCALE=0.001"
    answered = np.bincount(dataset.train.answers.label, minlength=len(dataset.classes))
    if unanswered := [name for name, count in zip(dataset.classes, answered, strict=True) if not count]:
        yield (
            f"nobody answered {few(unanswered)}: what no answer says is not learnt: "
            f"consider CLASSES without it, or labels that count from 0"
        )
    yield from _workers(dataset, settings)


def _workers(dataset: Dataset, settings: TrainingSettings) -> Iterator[str]:
    """A matrix has classes² entries; a worker of whom they cannot be learnt stays near where the matrix starts.

    What is advised is what was measured (crowdlayer/docs/quality.md).
    """
    classes = len(dataset.classes)
    given = np.bincount(dataset.train.answers.worker, minlength=len(dataset.workers))
    few = int((given < classes).sum())
    if settings.crowd_layer in ("matrix", "stochastic") and not _advised(settings) and 2 * few > len(given):
        yield (
            f"CROWD_LAYER={settings.crowd_layer}: {few} of {len(given)} workers gave fewer answers "
            f"than there are classes ({classes}): consider CROWD_LAYER=stochastic with CROWD_START=dawid-skene"
        )


def _advised(settings: TrainingSettings) -> bool:
    """Whether the worker model is the recommended one."""
    return settings.crowd_layer == "stochastic" and settings.crowd_start == "dawid-skene"


def beside_majority(figures: Mapping[str, float | None], settings: TrainingSettings) -> Iterator[str]:
    """Of what classifier and answers together say of the tasks, where the folders of train/ tell what is true."""
    ours, theirs = figures["train_accuracy"], figures["majority_vote_accuracy"]
    if settings.n_epochs < 3 or ours is None or theirs is None or ours >= theirs:
        return
    recommended = _advised(settings) and settings.mixup > 0
    remedy = "FOLDS=5" if settings.folds == 0 else "another LR, more N_EPOCHS or PRETRAINED"
    yield (
        f"of the inferred labels {ours:.1f} % are right, of majority vote's {theirs:.1f} %: "
        f"consider {remedy if recommended else 'the recommended settings of crowdlayer/docs/quality.md'}"
    )


def normed_by_few(classifier: nn.Module, settings: TrainingSettings, n_processes: int) -> str:
    """Of an evaluation that blows up although the training goes well: what helps beside a lower rate; may be nothing.

    Evaluated is by the running statistics of batch norm; in steps each process has those of its own share, but for
    SyncBatchNorm, which is no BatchNorm2d.
    """
    share = -(-settings.batch_size // n_processes)
    normed = any(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())
    if settings.freeze or not normed or share >= FEW_AT_ONCE:  # frozen, it keeps the statistics that it came with
        return ""
    return f", or raise BATCH_SIZE={settings.batch_size}: batch norm sees at most {share} images at once"


def after(history: History, best_epoch: int, settings: TrainingSettings) -> Iterator[str]:
    """Of how the training went."""
    epochs = len(history.train_loss)
    if epochs < 3:
        return
    if history.train_loss[-1] >= history.train_loss[0]:
        yield f"train_loss did not fall in {epochs} epochs: consider a lower LR than {settings.lr:g}"
    elif settings.select_by != "last" and best_epoch == epochs:
        yield f"the best epoch is the last: consider more than N_EPOCHS={settings.n_epochs}"
    elif settings.select_by != "last" and best_epoch <= epochs // 4:
        with_truth = history.val_accuracy[0] is not None
        yield (
            f"nothing was gained after epoch {best_epoch} of {epochs}: consider DATA_AUGMENTATION=true, "
            f"a lower LR than {settings.lr:g}, or SELECT_BY={others(settings.select_by, with_truth=with_truth)}"
        )


def _list(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
