"""check → sync → train → publish: the only place where storage meets training."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from .classifier import has_small_stem
from .dataset import Dataset, belongs, read_dataset
from .devices import devices
from .experiment import Images, Phases, check_possible, load_images, log_dataset, make_trainer, run
from .files import disk_errors, working_folder
from .results import Provenance, done_before, headline, publish, results_name
from .settings import Settings
from .storage import Place, place
from .sync import Synced, digest_of, fetch, must_be_there, must_stay_apart, sync
from .trainer import Trainer

log = logging.getLogger(__name__)


def train(settings: Settings) -> str:
    """Do the job; returns the location of the results."""
    phases = Phases()
    output = place(settings.output_location)
    location = f"{output.location}/{results_name(settings.output_name)}"
    must_be_there(settings.tasks)
    must_stay_apart(settings.tasks, {"OUTPUT": settings.output, "WORKDIR": settings.workdir}, belongs)
    check_possible(settings, settings.export)
    with working_folder(settings.workdir) as workdir:
        fresh = output.find(results_name(settings.output_name)) is None
        if fresh:  # where results are, a run could write, and this one may have nothing to do
            _probe(output, settings.output_name, workdir)
        inputs = _inputs(settings, workdir, phases)
        stored_settings = settings.model_dump(mode="json")
        if done_before(output, settings.output_name, stored_settings, inputs.digest):
            log.info("this very run was already done: nothing to do")
            return location
        if not fresh:
            _probe(output, settings.output_name, workdir)
        images, trainer = _ready(settings, inputs, workdir, phases)
        outcome = run(inputs.dataset, images, trainer, phases, workdir)
        small_stem = has_small_stem(trainer.classifier)
        provenance = Provenance(stored_settings, inputs.digest, devices(trainer.accelerator.device), small_stem)
        with tempfile.TemporaryDirectory(dir=workdir, prefix="out-") as folder:
            results = publish(output, Path(folder), settings.output_name, inputs.dataset, outcome, provenance, phases)
        seconds = "  ".join(f"{phase} {spent:.1f} s" for phase, spent in phases.seconds.items())
        log.info(headline(results), extra={"seconds": phases.seconds})
        log.info("results at %s  (%s)", location, seconds)
    return location


def check(settings: Settings) -> None:
    """Everything but train: read, reach, sync, decode, build, and say what was found."""
    phases = Phases()
    output = place(settings.output_location)
    must_be_there(settings.tasks)
    must_stay_apart(settings.tasks, {"OUTPUT": settings.output, "WORKDIR": settings.workdir}, belongs)
    check_possible(settings, settings.export)
    with working_folder(settings.workdir) as workdir:
        _probe(output, settings.output_name, workdir)
        log.info("output: %s can be written", output.location)
        inputs = _inputs(settings, workdir, phases)
        _, trainer = _ready(settings, inputs, workdir, phases)
        free = shutil.disk_usage(workdir).free
        log.info("devices: %s; %.1f GB of disk free", ", ".join(devices(trainer.accelerator.device)), free / 1e9)
        weights = sum(p.numel() for p in trainer.model.parameters())
        log.info("model: %s, %.1f million weights; %d steps per epoch, %d epochs",
                 settings.model, weights / 1e6, len(trainer.train), settings.n_epochs)  # fmt: skip
        if done_before(output, settings.output_name, settings.model_dump(mode="json"), inputs.digest):
            log.info("this very run was already done; a run would do nothing")
        log.info("check passed")


class _Inputs:
    """The data set and the weights on this machine, and one digest of all that was read."""

    def __init__(self, synced: Synced, dataset: Dataset, pretrained: bool | Path, digest: str) -> None:
        self.synced = synced
        self.dataset = dataset
        self.pretrained = pretrained
        self.digest = digest


def _inputs(settings: Settings, workdir: Path, phases: Phases) -> _Inputs:
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
    pretrained = files.get("PRETRAINED", settings.pretrained is True)
    return _Inputs(synced, dataset, pretrained, digest_of(digests))


def _ready(settings: Settings, inputs: _Inputs, workdir: Path, phases: Phases) -> tuple[Images, Trainer]:
    with phases("decode"):
        inputs.dataset, images = load_images(
            inputs.dataset, inputs.synced.root, settings, settings.max_bad_images, workdir, inputs.synced.digests
        )
    with phases("build"):
        trainer = make_trainer(inputs.dataset, images, settings, inputs.pretrained)
    return images, trainer


def _probe(output: Place, output_name: str, workdir: Path) -> None:
    """Write a file to the output and delete it: better to learn it now than after days of training."""
    name = f"results/{output_name}/.probe"
    with disk_errors(str(workdir)), tempfile.NamedTemporaryFile(dir=workdir) as file:
        file.write(b"crowdlayer can write here\n")
        file.flush()
        output.upload(Path(file.name), name)
    output.delete(name)
