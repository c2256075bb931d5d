"""Tables for people and their tools, in UTF-8 with commas and a line of names; and args.yaml."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from .. import __version__
from ..answers.label_studio import import_list
from ..data.dataset import Dataset
from ..learning.inference import Inferred
from ..learning.progress import History
from ..learning.quality import Workers

MOST_CELLS = 10**7
"""Beyond so many cells labels.csv leaves the posterior out, and confusion.csv the pairs that nobody answered."""
MOST_REVIEWED = 1000
"""Tasks in the list for Label Studio: more than anybody looks at before the next run."""
LEAST_COUNT = 0.005
"""What rounds to no answer."""
NUMBER = re.compile(r"[+-]?\d[\d_]*(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
FORMULA = tuple("=+-@\t\r\n＝＋－＠")
"""What a spreadsheet takes for the start of a formula (OWASP, CSV injection)."""

Cell = str | int | float | bool | None


def cell(value: Cell) -> str:
    """A value for a table: numbers with six digits after the point, text that no spreadsheet takes for a formula.

    Text that could be one begins with an apostrophe; negative numbers, also as names, stay what they are.
    """
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) >= 5e-7 else "0"
    return "" if value is None else str(value)


@lru_cache(2**14)  # names are in a table as often as they have rows
def _text(value: str) -> str:
    if value.startswith(FORMULA) and not NUMBER.fullmatch(value):
        value = f"'{value}"
    if re.search(r'[,;"\s]', value):
        return '"' + value.replace('"', '""') + '"'
    return value


def write_table(path: Path, names: Sequence[str], rows: Iterable[Iterable[Cell]]) -> None:
    """Write a table with a line of names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(",".join(map(cell, names)) + "\n")
        file.writelines(",".join(map(cell, row)) + "\n" for row in rows)


def write_labels(path: Path, dataset: Dataset, inferred: Inferred) -> None:
    """labels.csv: per task the label that classifier and answers together make likeliest; look at the first rows again.

    `consensus_quality_score` is how sure they are of it, an upper bound; `is_label_issue` is True where they hold the
    majority's label more likely wrong than right; `entropy` in nats; `rank` 1 is to be looked at first;
    `posterior_<class>` add to 1.
    """
    labels = inferred.labels
    columns = ["task", "consensus_label", "consensus_quality_score", "majority_label", "entropy", "is_label_issue"]
    columns += ["rank", "num_annotations", "split", "image"]
    whole = inferred.posterior.numel() <= MOST_CELLS
    if whole:
        columns += [f"posterior_{name}" for name in dataset.classes]
    tasks, images = ([name for part in dataset.crowd for name in getattr(part, what)] for what in ("tasks", "names"))
    n_train, majority, count = len(dataset.train.tasks), inferred.majority.tolist(), np.diff(dataset.answers.starts_at)
    label, score, entropy, issue = (
        figure.tolist() for figure in (labels.label, labels.score, labels.entropy, labels.issue)
    )

    def rows() -> Iterator[list[Cell]]:
        for rank, task in enumerate(labels.order.tolist(), 1):
            names = dataset.classes[label[task]], dataset.classes[majority[task]]
            row: list[Cell] = [tasks[task], names[0], score[task], names[1], entropy[task], issue[task], rank]
            row += [int(count[task]), "train" if task < n_train else "held_out", images[task]]
            yield row + (inferred.posterior[task].tolist() if whole else [])

    write_table(path, columns, rows())


def write_review(path: Path, dataset: Dataset, inferred: Inferred, tasks: str) -> None:
    """label_studio.json: the first `MOST_REVIEWED` tasks of labels.csv, as Label Studio imports them.

    `tasks` is the data set's location, where Label Studio finds the images.
    """
    labels = inferred.labels
    names = [name for part in dataset.crowd for name in part.names]
    order = labels.order[:MOST_REVIEWED].tolist()
    items = import_list(
        tasks,
        [names[task] for task in order],
        [dataset.classes[int(labels.label[task])] for task in order],
        [float(labels.score[task]) for task in order],
        f"crowdlayer {__version__}",
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(items), indent=1) + b"\n")


def write_workers(path: Path, dataset: Dataset, workers: Workers) -> None:
    """workers.csv: a row per worker, the worst first; `confusion_row` is its row in the model's `confusion`."""
    columns = worker_columns(dataset, workers)
    write_table(path, list(columns), zip(*columns.values(), strict=True))


def worker_columns(dataset: Dataset, workers: Workers) -> dict[str, list[Any]]:
    """The columns of workers.csv."""
    order = workers.order
    figures = {
        "annotator_quality": workers.quality,
        "annotator_quality_low": workers.low,
        "annotator_quality_high": workers.high,
        "agreement_with_consensus": workers.agreement,
    }
    return {
        "worker": [dataset.workers[row] for row in order.tolist()],
        "num_examples_labeled": workers.n[order].tolist(),
        **{name: [round(value, 6) for value in figure[order].tolist()] for name, figure in figures.items()},
        "worst_class": [dataset.classes[worst] for worst in workers.worst[order].tolist()],
        "spammer_score": [round(value, 6) for value in workers.spam[order].tolist()],
        "confusion_row": order.tolist(),
    }


def write_confusion(path: Path, dataset: Dataset, inferred: Inferred) -> None:
    """confusion.csv: a row per worker, true label and observed label, in the order of workers.csv.

    `prob` is P(observed | true, worker); `count` how many of the worker's answers the posterior puts there.
    """
    counts, workers, classes = inferred.consensus.counts, dataset.workers, dataset.classes
    least = -1.0 if len(workers) * len(classes) ** 2 <= MOST_CELLS else LEAST_COUNT

    def rows() -> Iterator[list[Cell]]:
        for some in counts.blocks(inferred.workers.order):
            table, confusion = counts.table(some), counts.confusion(some)
            shown = table >= least
            figures = (shown.nonzero().tolist(), confusion[shown].tolist(), table[shown].tolist())
            for (at, true, observed), prob, count in zip(*figures, strict=True):
                yield [workers[int(some[at])], classes[true], classes[observed], prob, count]

    write_table(path, ["worker", "true_label", "observed_label", "prob", "count"], rows())


def write_epochs(path: Path, history: History) -> None:
    """results.csv: a row per epoch, under the names that ultralytics' readers know; accuracies are percent.

    `time` is in seconds since the training began, over all starts of the run.
    """
    extra = list(dict.fromkeys(name for figures in history.figures for name in figures))
    extra.sort(key=lambda name: ["metrics", "lr", "crowd"].index(name.partition("/")[0]))
    first = [name for name in extra if name.startswith("metrics/")]
    rest = [name for name in extra if name not in first]
    names = ["epoch", "time", "train/loss", "val/loss", "metrics/accuracy_top1", *first, "lr/pg0", *rest]
    times = np.cumsum(history.seconds).tolist()

    def rows() -> Iterator[list[Cell]]:
        for at, figures in enumerate(history.figures):
            known = [history.train_loss[at], history.val_loss[at], history.val_accuracy[at]]
            values = [*known, *map(figures.get, first), history.lr[at], *map(figures.get, rest)]
            yield [at + 1, f"{times[at]:.3f}", *("" if value is None else f"{value:.7g}" for value in values)]

    write_table(path, names, rows())


def write_settings(path: Path, settings: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """args.yaml: every setting, and behind it where its value came from."""
    with path.open("w", encoding="utf-8") as file:
        for name, value in settings.items():
            text = _yaml(value, as_is=True)
            text = text if text.isprintable() else _yaml(value, as_is=False)
            file.write(f"{name}: {text}  # {sources.get(name, 'default')}\n")


def _yaml(value: Any, as_is: bool) -> str:
    """A value on a line; `as_is` with the letters of all languages, else with escapes for them, in quotes."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=as_is)
    return text.rstrip().removesuffix("...").rstrip()
