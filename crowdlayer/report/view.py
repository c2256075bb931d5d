"""A finished run → all that the report shows, as JSON: capped, so that a page of a large run is still a page."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import Dataset
from ..learning import metrics
from ..learning.experiment import Images, Outcome
from . import charts
from .pages import name

MOST_WORKERS = 10_000
"""Workers on the page: of more, the worst and the busiest, half each."""
MOST_CELLS = 1_000_000
"""Cells of the workers' matrices on the page, a byte each: of more, the matrices of the first workers of the page."""
MOST_REVIEWED = 48
"""Tasks shown to be looked at again."""
MOST_ANSWERS = 12
"""Answers shown of each of these."""
THUMBNAIL = 96
"""Pixels."""
LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""A probability as a character: 64 steps from 0 to 1."""
SPAMMER = 0.9
"""From this spammer score on a worker is suspected, given SPAMMER_ANSWERS, who may be no better than guessing."""
SPAMMER_ANSWERS = 10


def view(dataset: Dataset, outcome: Outcome, images: Images, results: dict[str, Any]) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it: what report.json holds."""
    classes = [name(text) for text in dataset.classes]
    rows = _workers_shown(outcome)
    predictions = outcome.predictions
    calibrated = {}
    confused = None
    for split, part, logits in (("test", dataset.test, predictions.test), ("val", dataset.val, predictions.validation)):
        if part is not None and logits is not None:
            labels = torch.from_numpy(part.labels)
            calibrated[split] = {
                "before": metrics.reliability_bins(logits, labels),
                "after": metrics.reliability_bins(logits / results["temperature"], labels),
            }
            if confused is None:
                table = metrics.confusion_matrix(logits.argmax(1), labels, len(classes))
                confused = {"split": split, **_confused(table, classes)}
    return {
        "results": {key: value for key, value in results.items() if key not in ("workers", "class_names")},
        "classes": classes,
        "learning_rate": outcome.history.lr,
        "confusion": confused,
        "reliability": calibrated,
        "workers": _workers(dataset, outcome, rows),
        "matrices": _matrices(outcome, rows),
        "suspects": {"count": int(_suspected(outcome).sum()), "score": SPAMMER, "answers": SPAMMER_ANSWERS},
        "review": _review(dataset, outcome, images),
        "data": _data(dataset, outcome),
    }


def _suspected(outcome: Outcome) -> Tensor:
    """(n_workers,) bool. Of many classes honest work has a high score too, if seldom right: it is better than guessing.

    One who guesses each class as often as the worker answers it is right by chance as often as that class comes.
    """
    workers, counts = outcome.inferred.workers, outcome.inferred.consensus.counts
    answered, true = counts.answered, counts.seen.sum(0)
    chance = (answered / answered.sum(1, keepdim=True).clamp_min(1)) @ (true / true.sum())
    return (workers.spam >= SPAMMER) & (workers.n >= SPAMMER_ANSWERS) & (workers.low <= chance)


def _confused(table: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """The matrix where it can be seen, and the pairs most often confused."""
    wrong = table.clone()
    wrong.fill_diagonal_(0)
    pairs = [
        {"true": classes[int(at) // len(classes)], "predicted": classes[int(at) % len(classes)], "count": int(count)}
        for count, at in zip(*wrong.flatten().topk(min(10, wrong.numel())), strict=True)
        if count > 0
    ]
    seen = table.tolist() if len(classes) <= charts.MOST_CLASSES else None
    return {"counts": seen, "pairs": pairs, "n_images": int(table.sum())}


def _workers_shown(outcome: Outcome) -> list[int]:
    workers = outcome.inferred.workers
    order: list[int] = workers.order.tolist()
    if len(order) <= MOST_WORKERS:
        return order
    busiest = set(workers.n.argsort(descending=True)[: MOST_WORKERS // 2].tolist())
    worst = [row for row in order if row not in busiest][: MOST_WORKERS - len(busiest)]
    shown = busiest | set(worst)
    return [row for row in order if row in shown]


def _workers(dataset: Dataset, outcome: Outcome, rows: Sequence[int]) -> list[list[Any]]:
    """Per worker: name, answers, quality, low, high, agreement, worst class, spammer score, whether suspected."""
    of, suspected = outcome.inferred.workers, _suspected(outcome)
    names, at = [name(dataset.workers[row]) for row in rows], torch.tensor(rows)
    rounded = [[round(f, 3) for f in figure[at].tolist()] for figure in (of.quality, of.low, of.high, of.agreement)]
    scores = [round(score, 3) for score in of.spam[at].tolist()]
    columns = [names, of.n[at].tolist(), *rounded, of.worst[at].tolist(), scores, suspected[at].int().tolist()]
    return [list(row) for row in zip(*columns, strict=True)]


def _matrices(outcome: Outcome, rows: Sequence[int]) -> list[str]:
    """The matrices of the first workers shown, a character per cell, row after row."""
    counts = outcome.inferred.consensus.counts
    n_cells = counts.n_classes**2
    if n_cells > MOST_CELLS // 10:
        return []
    matrices = counts.confusion(torch.tensor(rows[: MOST_CELLS // n_cells]))
    levels = (matrices * (len(LEVELS) - 1)).round().long().flatten(1).tolist()
    return ["".join(LEVELS[level] for level in mine) for mine in levels]


def _review(dataset: Dataset, outcome: Outcome, images: Images) -> list[dict[str, Any]]:
    """The tasks to look at again, with their images, the answers they got, and what the classifier alone says."""
    inferred, answers = outcome.inferred, dataset.answers
    names, tasks = ([text for part in dataset.crowd for text in getattr(part, what)] for what in ("names", "tasks"))
    n_train, found = len(dataset.train.tasks), []
    for task in inferred.labels.order[:MOST_REVIEWED].tolist():
        start, stop = answers.starts_at[task : task + 2].tolist()
        given = [
            [name(dataset.workers[worker]), int(label)]
            for worker, label in zip(answers.worker[start:stop], answers.label[start:stop], strict=True)
        ]
        part, row = (images.train, task) if task < n_train else (images.validation, task - n_train)
        majority = int(inferred.majority[task])
        found.append(
            {
                "task": name(tasks[task]),
                "image": name(names[task]),
                "label": int(inferred.labels.label[task]),
                "score": round(float(inferred.labels.score[task]), 3),
                "majority": majority,
                "majority_score": round(float(inferred.posterior[task, majority]), 3),
                "classifier": int(inferred.classifier[task]),
                "issue": bool(inferred.labels.issue[task]),
                "answers": given[:MOST_ANSWERS],
                "n_answers": stop - start,
                "thumbnail": thumbnail(part[torch.tensor([row])][0].numpy()),
            }
        )
    return found


def thumbnail(pixels: np.ndarray) -> str:
    """(size, size, 3) uint8 → a small JPEG, in base64."""
    image = Image.fromarray(pixels)
    if image.width > THUMBNAIL:
        image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return base64.b64encode(file.getvalue()).decode()


def _data(dataset: Dataset, outcome: Outcome) -> dict[str, Any]:
    """Histograms, and how often each class occurs."""
    per_task = np.diff(dataset.answers.starts_at)
    per_worker = outcome.inferred.workers.n.numpy()
    k = len(dataset.classes)
    balance = {
        "answers": np.bincount(dataset.answers.label, minlength=k),
        "inferred labels": np.bincount(outcome.inferred.labels.label.numpy(), minlength=k),
    }
    for split, part in (("val", dataset.val), ("test", dataset.test)):
        if part is not None:
            balance[split] = np.bincount(part.labels, minlength=k)
    shares = {what: (100 * counts / counts.sum()).round(1).tolist() for what, counts in balance.items()}
    splits = {"tasks trained on": dataset.train, "tasks held out": dataset.held_out}
    return {
        "answers_per_task": _histogram(per_task),
        "answers_per_worker": _histogram(per_worker),
        "balance": shares if k <= charts.MOST_CLASSES else None,
        "images": {what: len(part.names) for what, part in splits.items() if part is not None}
        | {
            f"{split} images": len(p.names)
            for split, p in (("val", dataset.val), ("test", dataset.test))
            if p is not None
        },
    }


def _histogram(counts: np.ndarray) -> dict[str, list[Any]]:
    """How many have 1, 2 … answers; of wide ranges in bins that double."""
    low, high = int(counts.min()), int(counts.max())
    doubling = [2**power for power in range(high.bit_length()) if 2**power > low]
    bounds = [*(range(low, high + 1) if high - low < 12 else (low, *doubling)), high + 1]
    names = [f"{a}" if b - a == 1 else f"{a}–{b - 1}" for a, b in itertools.pairwise(bounds)]
    found, _ = np.histogram(counts, bounds)
    return {"labels": names, "counts": found.tolist()}
