"""Several runs on one page, side by side, from their results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..settings import NO_INFLUENCE
from . import charts
from .drawing import SERIES, to_svg
from .pages import figure, percent, rendered

FIGURES = {
    "test_accuracy": ("test accuracy", True),
    "train_accuracy": ("inferred labels right", True),
    "majority_vote_accuracy": ("majority vote right", True),
    "ece": ("calibration error", False),
    "log_loss": ("test log-loss", False),
    "best_epoch": ("best epoch", None),
    "seconds": ("seconds of training, last start", None),
}
"""What is compared, under which name, and whether more is better."""
NOT_COMPARED = NO_INFLUENCE - {"answers", "path_remove"}
"""Settings that differ of themselves; that the data do is said."""


def compared(results: dict[str, Any]) -> dict[str, float | None]:
    """The figures of FIGURES of one run; None for those that it does not have."""
    calibration = (results.get("calibration") or {}).get("test")
    seconds = results["job"].get("seconds") or {}
    found = {name: results.get(name) for name in FIGURES} | {"seconds": seconds.get("train")}
    if calibration is not None:
        found |= {"ece": calibration["after"]["ece"], "log_loss": calibration["after"]["log_loss"]}
    return {name: value if isinstance(value, int | float) else None for name, value in found.items()}


def page(names: Sequence[str], runs: Sequence[dict[str, Any]]) -> str:
    """The page of `runs` with these `names`: the best figure of each kind is marked, settings that differ are shown."""
    figures = [compared(results) for results in runs]
    best = {}
    for key, (_, more_is_better) in FIGURES.items():
        known = [found[key] for found in figures if found[key] is not None]
        if more_is_better is not None and len(set(known)) > 1:
            best[key] = max(known) if more_is_better else min(known)  # type: ignore[type-var]
    settings = [results["job"]["settings"] for results in runs]
    every = list(dict.fromkeys(key for mine in settings for key in mine))
    differ = [
        key
        for key in every
        if key not in NOT_COMPARED and len({json.dumps(mine.get(key), sort_keys=True) for mine in settings}) > 1
    ]
    rows = [
        {
            "name": name,
            "data_set": results["job"].get("data_set", ""),
            "figures": [(found[key], shown(key, found[key]), found[key] == best.get(key, ())) for key in FIGURES],
            "settings": [said(mine.get(key)) for key in differ],
        }
        for name, results, found, mine in zip(names, runs, figures, settings, strict=True)
    ]
    accuracies = [found["test_accuracy"] for found in figures]
    order = sorted(range(len(runs)), key=lambda at: (accuracies[at] is None, -(accuracies[at] or 0)))[: len(SERIES)]
    chosen = [(names[at], runs[at]) for at in order]
    drawn = [
        {
            "title": title,
            "drawing": to_svg(charts.curves(title, {name: results[key] for name, results in chosen}, None, unit, 520)),
        }
        for title, key, unit in (("validation accuracy", "val_accuracy", "%"), ("validation loss", "val_loss", "loss"))
        if any(value is not None for _, results in chosen for value in results[key])
    ]
    digests = {results["job"].get("data_digest") for results in runs}
    heads = [name for name, _ in FIGURES.values()]
    return rendered(
        "compare.html", "compare.js", rows=rows, heads=heads, differ=differ, curves=drawn, n_shown=len(chosen),
        same_data=len(digests) == 1, ranked=any(accuracy is not None for accuracy in accuracies),
    )  # fmt: skip


def said(value: Any) -> str:
    """A setting, as one would write it."""
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def shown(key: str, value: float | None) -> str:
    """A figure with its unit."""
    if key.endswith("_accuracy"):
        return percent(value)
    digits = {"best_epoch": 0, "seconds": 1}
    return figure(value, digits.get(key, 3))
