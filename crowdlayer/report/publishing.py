"""The files of a finished run: staged on this machine, then put so that the results come last."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..deployment.export import export
from ..deployment.model_files import Description, rebuilt, write_model
from ..errors import SettingsError
from ..learning.classifier import transforms_input
from ..learning.experiment import Phases
from ..learning.tensors import write_tensors
from ..storage.durable import whole
from ..storage.files import disk_errors, file_digest
from ..storage.places import Place
from .html import card, page
from .pictures import write_pictures
from .results import Finished, document, dumped, files_before, manifest_name, model_name, results_name
from .tables import write_confusion, write_epochs, write_labels, write_review, write_settings, write_workers
from .view import view

log = logging.getLogger(__name__)


def stage(folder: Path, run: Finished) -> list[str]:
    """Write every file but the results below `folder`; returns their names, relative to the output."""
    dataset, outcome, output_name = run.dataset, run.outcome, run.name
    tables = [f"results/{output_name}/{name}.csv" for name in ("labels", "workers", "confusion")]
    names = [model_name(output_name), *tables]
    model, labels, workers, matrices = (folder / name for name in names)
    with disk_errors(str(folder)):
        model.parent.mkdir(parents=True, exist_ok=True)
        labels.parent.mkdir(parents=True, exist_ok=True)
        write_tensors({"confusion": outcome.confusion, "classifier": outcome.best.classifier}, model)
        write_labels(labels, dataset, outcome.inferred)
        write_workers(workers, dataset, outcome.inferred.workers)
        write_confusion(matrices, dataset, outcome.inferred)
        review = f"results/{output_name}/label_studio.json"
        write_review(folder / review, dataset, outcome.inferred, run.provenance.settings["tasks"])
        names.append(review)
    deployed = f"best_models/{output_name}"
    names += [f"{deployed}/{name}" for name in deploy_model(folder / deployed, run)]
    return names


def deploy_model(folder: Path, run: Finished) -> list[str]:
    """Write the best classifier for other programs into `folder`; returns the names of the files.

    An export that fails costs its own files, not the run's.
    """
    settings, weights = run.provenance.settings, run.outcome.best.classifier
    description = Description(
        settings["model"],
        list(run.dataset.classes),
        settings["img_size"],
        run.provenance.small_stem,
        run.outcome.figures["temperature"],
        transforms_input(settings["model"], settings["pretrained"] is True),
    )
    names = write_model(folder, description, weights)
    if settings.get("export"):
        model = rebuilt(description, weights)
        for form in settings["export"]:
            try:
                names += export(folder, model, description.image_size, [form])
            except SettingsError as error:
                log.error("%s", error)
    return names


def dress(folder: Path, run: Finished, results: dict[str, Any]) -> list[str]:
    """Write what people look at into `folder`: the report, pictures, the model card; returns the names of the files."""
    shown = view(run.dataset, run.outcome, run.images, results)
    texts = {"report.json": "".join(dumped(shown)), "report.html": page(shown), "README.md": card(results)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_epochs(folder / "results.csv", run.outcome.history)
    write_settings(folder / "args.yaml", results["job"]["settings"], results["job"]["sources"])
    return [*texts, "results.csv", "args.yaml", *write_pictures(folder, run.dataset, run.outcome, run.images)]


def publish(place: Place, folder: Path, run: Finished, phases: Phases) -> dict[str, Any]:
    """Put a run's files to `place`: the results last of all, and no older results beside a newer model.

    Of older results no file stays that this run does not have, such as an export of the older model.

    Returns the results.
    """
    run = replace(run, dataset=run.dataset.spelt_out())
    last, beside = results_name(run.name), f"results/{run.name}"
    with phases("report"), disk_errors(str(folder)):
        names = stage(folder, run)
        results = document(run, phases.seconds)
        results["job"]["files"] = {name: file_digest(folder / name) for name in names}
        names += [f"{beside}/{name}" for name in dress(folder / beside, run, results)]
        digests = {name: file_digest(folder / name) for name in names}
        manifest = manifest_name(run.name)  # sha256sum --check reads it, in the output's folder
        (folder / manifest).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        results["job"]["files"] = digests | {manifest: file_digest(folder / manifest)}
        _write_whole(folder / last, results)  # all is here, should it not be put
    with phases("publish"):
        older = files_before(place, run.name)
        if place.find(last) is not None:
            place.delete(last)
        for name in sorted(older - results["job"]["files"].keys()):
            place.delete(name)
        for name in results["job"]["files"]:
            place.upload(folder / name, name)
        for name in results["job"]["files"]:
            place.compare(folder / name, name)  # or another run of this name published meanwhile, under our results
    results["job"]["seconds"] = dict(phases.seconds)
    with disk_errors(str(folder)):
        _write_whole(folder / last, results)
    place.upload(folder / last, last)
    return results


def _write_whole(path: Path, results: dict[str, Any]) -> None:
    with whole(path) as file:
        file.writelines(piece.encode() for piece in dumped(results))
