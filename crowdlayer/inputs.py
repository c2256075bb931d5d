"""What a run needs before it trains: the data set and the weights on this machine, and an output it can write to."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .data.dataset import Dataset
from .data.layout import belongs, read_dataset
from .deployment.export import Format, check_export
from .errors import CrowdlayerError, SettingsError, StoreError, together
from .learning.classifier import build_classifier
from .learning.devices import compiler_must_be_there, precision, processes_here
from .learning.experiment import Phases, log_dataset
from .machine.launch import Launch
from .report.results import is_of_run
from .settings import RunSettings, Settings, TrainingSettings
from .storage.files import disk_errors
from .storage.places import Place
from .storage.sync import Synced, digest_of, fetch, inside, must_be_there, must_outlast, must_stay_apart, sync

PROBE = b"crowdlayer can write here\n"


@dataclass(frozen=True)
class Inputs:
    """The data set and the weights that PRETRAINED names on this machine, and one digest of all that was read."""

    synced: Synced
    dataset: Dataset
    weights: Path | None
    digest: str


def check_possible(settings: TrainingSettings, formats: Sequence[Format] = (), workdir: str | None = None) -> None:
    """Refuse settings that no data set can make work, before anything is downloaded.

    Raises:
        SettingsError: the model cannot take such images or has no such stem, the device has no such precision, there is
            no compiler for COMPILE=true, the model cannot be exported in one of `formats`.
    """

    def network() -> None:
        with torch.random.fork_rng(devices=[]):
            size = settings.img_size
            model = build_classifier(settings.model, 2, size, False, settings.freeze, settings.small_images)
            above = Path(workdir) if workdir and os.path.isdir(workdir) else None  # noqa: PTH112  raises never
            check_export(model, size, formats, above)

    together(lambda: precision(settings), lambda: compiler_must_be_there(settings), network)


def check_places(settings: Settings) -> None:
    """Refuse places that are not there or do not go together, before anything is read or written.

    Nothing is read that the run itself puts: its next start would read something else, and be another run.

    Raises:
        SettingsError: naming the place.
    """
    written: dict[str, str | None] = {
        "OUTPUT": settings.output_location,
        "TENSORBOARD": settings.tensorboard,
        "METRICS_FILE": settings.metrics_file,
    }
    own = {"OUTPUT": settings.output, "WORKDIR": settings.workdir}
    read = {"ANSWERS": settings.answers, "PATH_REMOVE": settings.path_remove, "PRETRAINED": settings.pretrained}

    def is_no_result(setting: str, location: object) -> None:
        name = inside(location, settings.output_location) if isinstance(location, str) else None
        if name is not None and is_of_run(name, settings.output_name):
            raise SettingsError(
                f"{setting}: must not be a file that this run puts itself, is {location}; another OUTPUT_NAME leaves it"
            )

    together(
        lambda: must_be_there(settings.tasks),
        lambda: must_stay_apart(settings.tasks, own, belongs),
        lambda: must_outlast(settings.workdir, written),
        *(functools.partial(is_no_result, *one) for one in read.items()),
    )


def read_inputs(settings: RunSettings, workdir: Path, phases: Phases) -> Inputs:
    """Sync and read all that the settings name.

    Raises:
        SettingsError, DataError, AccessError, StoreError: as the places and the data say.
    """
    with phases("sync"):
        files: dict[str, Path] = {}
        digests: dict[str, str] = {}
        elsewhere = {"ANSWERS": settings.answers, "PATH_REMOVE": settings.path_remove}
        if isinstance(settings.pretrained, str):
            elsewhere["PRETRAINED"] = settings.pretrained
        for name, location in elsewhere.items():
            if location is not None:
                files[name], digests[name] = fetch(location, workdir, name)
        synced = sync(settings.tasks, workdir, belongs)
        digests["data"] = synced.digest()
    with phases("read"):
        answers = files.get("ANSWERS", synced.root / "answers.json")
        digest = digests.get("ANSWERS", synced.digests.get("answers.json"))
        kept = None if digest is None else workdir / "cache" / f"answers-{digest}.npz"
        dataset = read_dataset(
            synced.root, synced.digests, settings, answers, files.get("PATH_REMOVE"), settings.seed, kept
        )
        log_dataset(dataset)
        if settings.folds > (n := len(dataset.train.names)):
            raise SettingsError(f"FOLDS: must be at most {n}, the tasks trained on, got {settings.folds}")
    return Inputs(synced, dataset, files.get("PRETRAINED"), digest_of(digests))


def processes_to_start(settings: Settings, launch: Launch) -> int:
    """How many training processes are to be started on this node."""
    if launch.peers is None:
        return processes_here(settings.n_processes)
    if settings.n_processes not in ("auto", 1):
        raise SettingsError(
            f"N_PROCESSES: must be auto or 1 where {launch.platform} has started {launch.peers.world} processes, "
            f"got {settings.n_processes}"
        )
    return 1


def probe(output: Place, output_name: str, workdir: Path) -> None:
    """Write a file to the output, read it and delete it: better to learn it now than after days of training."""
    name = f"results/{output_name}/.probe"
    with disk_errors(str(workdir)), tempfile.NamedTemporaryFile(dir=workdir) as file:
        file.write(PROBE)
        file.flush()
        try:
            output.upload(Path(file.name), name)
            found = output.read(name)
        except CrowdlayerError:  # of whatever half: the store may have the file and not say so
            with contextlib.suppress(CrowdlayerError):
                output.delete(name)
            raise
    output.delete(name)
    if found != PROBE:
        raise StoreError(f"{output.location}/{name}: what was written must read back the same, it does not")
