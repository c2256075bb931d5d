"""What the results hold, and the files of a finished run, staged so that the results come last."""

from __future__ import annotations

import json
import logging
import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.dataset import Dataset, summary
from ..deployment.export import export
from ..deployment.model_files import Description, rebuilt, write_model
from ..errors import SettingsError, StoreError, one_line
from ..learning.experiment import Images, Outcome, Phases
from ..learning.inference import calibration, crowd_figures
from ..settings import influential
from ..storage.durable import whole
from ..storage.files import disk_errors, file_digest
from ..storage.places import Place
from .html import card, page
from .pictures import write_pictures
from .tables import (
    worker_columns,
    write_confusion,
    write_epochs,
    write_labels,
    write_review,
    write_settings,
    write_workers,
)
from .view import view

log = logging.getLogger(__name__)

TOP_K_FROM = 8
"""From so many classes on the results hold the top-2 and top-5 figures."""
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


def results_name(output_name: str) -> str:
    return f"results/{output_name}.json"


def model_name(output_name: str) -> str:
    return f"best_models/{output_name}.pth"


def stage(folder: Path, output_name: str, dataset: Dataset, outcome: Outcome, provenance: Provenance) -> list[str]:
    """Write every file but the results below `folder`; returns their names, relative to the output."""
    tables = [f"results/{output_name}/{name}.csv" for name in ("labels", "workers", "confusion")]
    names = [model_name(output_name), *tables]
    model, labels, workers, matrices = (folder / name for name in names)
    with disk_errors(str(folder)):
        model.parent.mkdir(parents=True, exist_ok=True)
        labels.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({"confusion": outcome.best.confusion, "classifier": outcome.best.classifier}, model)
        except RuntimeError as error:  # torch's word for a full disk
            raise StoreError(f"{folder}: the model must be written whole: {one_line(str(error))}") from error
        write_labels(labels, dataset, outcome.inferred)
        write_workers(workers, dataset, outcome.inferred.workers)
        write_confusion(matrices, dataset, outcome.inferred)
        review = f"results/{output_name}/label_studio.json"
        write_review(folder / review, dataset, outcome.inferred, provenance.settings["tasks"])
        names.append(review)
    deployed = f"best_models/{output_name}"
    names += [f"{deployed}/{name}" for name in deploy_model(folder / deployed, dataset, outcome, provenance)]
    return names


def deploy_model(folder: Path, dataset: Dataset, outcome: Outcome, provenance: Provenance) -> list[str]:
    """Write the best classifier for other programs into `folder`; returns the names of the files.

    An export that fails costs its own files, not the run's.
    """
    settings = provenance.settings
    description = Description(
        settings["model"],
        list(dataset.classes),
        settings["img_size"],
        provenance.small_stem,
        outcome.figures.get("temperature", 1.0),
    )
    names = write_model(folder, description, outcome.best.classifier)
    if settings.get("export"):
        model = rebuilt(description, outcome.best.classifier)
        try:
            names += export(folder, model, description.image_size, settings["export"])
        except SettingsError as error:
            log.error("%s", error)
    return names


def dress(folder: Path, dataset: Dataset, outcome: Outcome, images: Images, results: dict[str, Any]) -> list[str]:
    """Write what people look at into `folder`: the report, pictures, the model card; returns the names of the files."""
    shown = view(dataset, outcome, images, results)
    texts = {"report.json": dumped(shown), "report.html": page(shown), "README.md": card(results)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_epochs(folder / "results.csv", outcome.history)
    write_settings(folder / "args.yaml", results["job"]["settings"], results["job"]["sources"])
    return [*texts, "results.csv", "args.yaml", *write_pictures(folder, dataset, outcome, images)]


def publish(
    place: Place,
    folder: Path,
    output_name: str,
    dataset: Dataset,
    outcome: Outcome,
    images: Images,
    provenance: Provenance,
    phases: Phases,
) -> dict[str, Any]:
    """Put a run's files to `place`: the results last of all, and no older results beside a newer model.

    Returns the results.
    """
    last, beside = results_name(output_name), f"results/{output_name}"
    with phases("report"), disk_errors(str(folder)):
        names = stage(folder, output_name, dataset, outcome, provenance)
        results = document(dataset, outcome, provenance, phases)
        results["job"]["files"] = {name: file_digest(folder / name) for name in names}
        names += [f"{beside}/{name}" for name in dress(folder / beside, dataset, outcome, images, results)]
        digests = {name: file_digest(folder / name) for name in names}
        manifest = f"{beside}/manifest.sha256"  # sha256sum --check reads it, in the output's folder
        (folder / manifest).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        results["job"]["files"] = digests | {manifest: file_digest(folder / manifest)}
        _write_whole(folder / last, results)  # all is here, should it not be put
    with phases("publish"):
        if place.find(last) is not None:
            place.delete(last)
        for name in results["job"]["files"]:
            place.upload(folder / name, name)
    results["job"]["seconds"] = dict(phases.seconds)
    with disk_errors(str(folder)):
        _write_whole(folder / last, results)
    place.upload(folder / last, last)
    return results


def _write_whole(path: Path, results: dict[str, Any]) -> None:
    with whole(path) as file:
        file.write(dumped(results).encode())


def dumped(value: dict[str, Any]) -> str:
    """JSON as other programs read it: no NaN."""
    return json.dumps(value, indent=3, ensure_ascii=False, allow_nan=False) + "\n"


def document(dataset: Dataset, outcome: Outcome, provenance: Provenance, phases: Phases) -> dict[str, Any]:
    """The results: the seed's keys at the top, then ours. A figure that does not exist is None."""
    history, figures = outcome.history, outcome.figures
    seed: dict[str, Any] = {
        "train_loss": history.train_loss,
        "val_loss": history.val_loss,
        "val_accuracy": history.val_accuracy,
    }
    names = ["test_loss", "test_accuracy", "test_ece"]
    if len(dataset.classes) >= TOP_K_FROM:
        names += [f"{s}_{mean}_top{k}" for s in ("val", "test") for mean in ("micro", "macro") for k in (2, 5)]
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
            "seconds": dict(phases.seconds),
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
        return same and all(place.find(name) is not None for name in job["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # peerannot's, or somebody else's
        return False


def headline(results: dict[str, Any]) -> str:
    """The figures that one looks for first, in a line."""
    shown = [
        ("test accuracy", results["test_accuracy"]),
        ("inferred labels right", results["train_accuracy"]),
        ("majority vote right", results["majority_vote_accuracy"]),
    ]
    figures = ", ".join(f"{name} {value:.1f} %" for name, value in shown if value is not None)
    return f"best epoch {results['best_epoch']} of {len(results['train_loss'])}" + (f": {figures}" if figures else "")
