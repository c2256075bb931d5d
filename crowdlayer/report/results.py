"""What the results hold."""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from .. import __version__
from ..data.dataset import Dataset, summary
from ..learning import advice
from ..learning.experiment import Images, Outcome
from ..learning.inference import calibration, crowd_figures
from ..learning.metrics import TOP_K, TOP_K_FROM
from ..settings import TrainingSettings, influential
from ..storage.files import can_be_named
from ..storage.places import Place
from .tables import worker_columns

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "accelerate", "boto3", "numpy", "pillow")


@dataclass(frozen=True)
class Provenance:
    """What a run was made from: all its settings, the SHA-256 of the data it read, and where it ran."""

    settings: dict[str, Any]
    data_digest: str
    devices: list[str]
    small_stem: bool
    sources: dict[str, str] = field(default_factory=dict)
    """Where a setting's value came from, where that is not its default: environment or argument."""


@dataclass(frozen=True)
class Finished:
    """A finished run: on what it was trained, what came out, and what it was made from."""

    dataset: Dataset
    images: Images
    outcome: Outcome
    provenance: Provenance

    @property
    def name(self) -> str:
        """OUTPUT_NAME."""
        return str(self.provenance.settings["output_name"])


def results_name(output_name: str) -> str:
    return f"results/{output_name}.json"


def model_name(output_name: str) -> str:
    return f"best_models/{output_name}.pth"


def is_of_run(name: str, output_name: str) -> bool:
    """Whether a file of this name in the output is one that a run puts."""
    names, folders = (results_name(output_name), model_name(output_name)), ("best_models", "results", "checkpoints")
    return name in names or name.startswith(tuple(f"{folder}/{output_name}/" for folder in folders))


def dumped(value: dict[str, Any]) -> Iterator[str]:
    """JSON as other programs read it: no NaN. In pieces: at once the figures of a million workers were 0.7 GB more."""
    yield from json.JSONEncoder(indent=3, ensure_ascii=False, allow_nan=False).iterencode(value)
    yield "\n"


def document(run: Finished, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The results: the seed's keys at the top, then ours. A figure that does not exist is None.

    `seconds`: so far, per phase.
    """
    dataset, outcome, provenance = run.dataset, run.outcome, run.provenance
    history, figures = outcome.history, outcome.figures
    seed: dict[str, Any] = {
        "train_loss": history.train_loss,
        "val_loss": history.val_loss,
        "val_accuracy": history.val_accuracy,
    }
    names = ["test_loss", "test_accuracy", "test_ece"]
    if len(dataset.classes) >= TOP_K_FROM:
        names += [f"{s}_{mean}_top{k}" for s in ("val", "test") for mean in ("micro", "macro") for k in TOP_K]
    counts = summary(dataset)
    return {
        **seed,
        **{name: _finite(figures.get(name)) for name in names},
        "best_epoch": outcome.best.epoch,
        "crowd_layer": outcome.crowd_layer,
        "collapsed": outcome.collapsed_since is not None,
        "collapsed_since": outcome.collapsed_since,
        "class_names": list(dataset.classes),
        "n_tasks": counts["n_tasks"],
        "n_workers": counts["n_workers"],
        "n_answers": counts["n_answers"],
        "n_held_out": 0 if dataset.held_out is None else len(dataset.held_out.names),
        "left_out": dataset.left_out,
        "broken_images": dataset.broken,
        **crowd_figures(dataset, outcome.inferred),
        "n_label_issues": int(outcome.inferred.labels.issue.sum()),
        "temperature": figures["temperature"],
        "temperature_fitted_on": "val" if dataset.val is not None else "held-out answers",
        "posterior_temperature": outcome.inferred.temperature,
        "folds": outcome.folds,
        "calibration": calibration(dataset, outcome.predictions, figures["temperature"]),
        "workers": worker_columns(dataset, outcome.inferred.workers),
        "baselines": outcome.baselines,
        "job": {
            "version": __version__,
            "data_set": dataset.name,
            "settings": provenance.settings,
            "sources": {name: provenance.sources.get(name, "default") for name in provenance.settings},
            "seed": provenance.settings["seed"],
            "small_stem": provenance.small_stem,
            "devices": provenance.devices,
            "libraries": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
            "data_digest": provenance.data_digest,
            "files": {},
            "seconds": dict(seconds),
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def done_before(place: Place, output_name: str, settings: dict[str, Any], data_digest: str) -> bool:
    """Whether this very run, of these settings on this data, has published all its files at `place`."""
    raw = place.read(results_name(output_name))
    if raw is None:
        return False
    try:
        job = json.loads(raw)["job"]
        same = influential(job["settings"]) == influential(settings) and job["data_digest"] == data_digest
        return same and all(can_be_named(name) and place.find(name) is not None for name in job["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # peerannot's, or somebody else's
        return False


def manifest_name(output_name: str) -> str:
    return f"results/{output_name}/manifest.sha256"


def files_before(place: Place, output_name: str) -> set[str]:
    """The files of the run that is at `place` under this name: those of them that lie where a run's files do.

    Its manifest has them too, where it has lost its results already, and a newer run failed to take its place.
    """
    below = (f"best_models/{output_name}.", f"best_models/{output_name}/", f"results/{output_name}/")
    manifest = (place.read(manifest_name(output_name)) or b"").decode("utf-8", "replace")
    files: list[object] = [line[66:] for line in manifest.splitlines()]
    try:
        files += json.loads(place.read(results_name(output_name)) or b"{}")["job"]["files"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # peerannot's, or somebody else's
        pass
    named = {name for name in files if isinstance(name, str) and name.startswith(below) and can_be_named(name)}
    return {name for name in named if place.find(name) is not None}  # a list may say anything


def tell(results: dict[str, Any], settings: TrainingSettings) -> None:
    """Log the figures that one looks for first, and what they give reason to warn about."""
    log.info(headline(results), extra={"seconds": results["job"]["seconds"]})
    for warning in advice.beside_majority(results, settings):
        log.warning("%s", warning)


def headline(results: dict[str, Any]) -> str:
    """The figures that one looks for first, in a line."""
    shown = [
        ("test accuracy", results["test_accuracy"]),
        ("inferred labels right", results["train_accuracy"]),
        ("majority vote right", results["majority_vote_accuracy"]),
    ]
    figures = ", ".join(f"{name} {value:.1f} %" for name, value in shown if value is not None)
    return f"best epoch {results['best_epoch']} of {len(results['train_loss'])}" + (f": {figures}" if figures else "")
