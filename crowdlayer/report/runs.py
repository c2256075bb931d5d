"""The runs that are done: where their results lie, and what is in them."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from ..errors import DataError, SettingsError, one_line
from ..settings import as_location, folder_and_name, quoted
from ..storage.places import Place, place

log = logging.getLogger(__name__)


def runs_at(location: str) -> tuple[Place, list[str]]:
    """The place that holds results/, and the names of results there.

    Args:
        location: of one run, `…/results/<name>.json`, what the job prints; or of the output, with the results of many.

    Raises:
        SettingsError: it is none, or there are no results.
    """
    try:
        location = as_location(location)
    except ValueError as error:
        raise SettingsError(f"results: {error}, got {quoted(location)}") from error
    if location.endswith(".json"):
        folder, file = folder_and_name(location)
        above, last = folder_and_name(folder)
        if last != "results":
            raise SettingsError(f"results: must be results/<name>.json or the folder above, got {one_line(location)}")
        at, name = place(above), f"results/{file}"
        names = [name] if at.find(name) is not None else []
    else:
        at = place(location)
        found = sorted(file.name for file in at.below("results") if re.fullmatch(r"results/[^/]+\.json", file.name))
        names = [name for name in found if not _is_peerannots(at, name)]
    if not names:
        raise SettingsError(f"results: must name a run, there is none at {one_line(location)}")
    return at, names


def _is_peerannots(at: Place, name: str) -> bool:
    """Whether these are results of peerannot's, which has the same folder for them: its figures, and no job."""
    try:
        results = json.loads(at.read(name) or b"")
        theirs = isinstance(results["train_loss"], list) and results.get("job") is None
    except (ValueError, KeyError, TypeError, RecursionError):  # damaged, perhaps: whoever reads them says so
        return False
    if theirs:
        log.warning("%s: left out, it says nothing of a job: peerannot's?", one_line(f"{at.location}/{name}"))
    return theirs


def read_results(place: Place, name: str) -> dict[str, Any]:
    """The results of a run.

    Raises:
        DataError: they are not ours.
    """
    where = one_line(f"{place.location}/{name}")
    try:
        results: dict[str, Any] = json.loads(place.read(name) or b"")
        job = results["job"]
        if not isinstance(job["settings"], dict) or not isinstance(job["version"], str):
            raise TypeError
        for series in ("val_loss", "val_accuracy"):
            if not all(value is None or isinstance(value, float | int) for value in results[series]):
                raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: must be the results of a run of crowdlayer") from error
    return results
