"""--check: everything but train, as a table whose rows are ok, a warning or an error, each with its remedy."""

from __future__ import annotations

import itertools
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import torch

from .data.dataset import Dataset, summary
from .errors import AccessError, CrowdlayerError, DataError, DeviceMemoryError, SettingsError, StoreError, one_line
from .inputs import Inputs, check_places, check_possible, probe, processes_to_start, read_inputs
from .learning import advice
from .learning.checkpoint import Checkpoints
from .learning.devices import bound_to_container, device_memory, device_name, driver, enough_memory, precision
from .learning.experiment import Experiment, Images, Phases, checkpoints_size, load_images
from .learning.inference import LESS, matrices_of
from .learning.progress import Progress
from .learning.spool import Identity
from .learning.trainer import EVALUATION_BATCHES, Trainer, Watch
from .logs import duration
from .machine.launch import Launch, as_alone, recognise
from .machine.memory import free_memory, used_memory
from .report.results import done_before
from .run_folder import workdir_of
from .settings import Settings
from .storage.files import disk_errors
from .storage.places import place
from .storage.sync import must_be_there
from .storage.workdir import working_folder

log = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["ok", "warning", "error"]
LEVELS: dict[State, int] = {"ok": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
REMEDIES: dict[type[CrowdlayerError], str] = {
    SettingsError: "set the variable that is named; --help lists all",
    DataError: "mend what is named; crowdlayer/docs/data-set.md has the rules",
    AccessError: "give the job's credentials or user the rights; crowdlayer/docs/data-set.md names them",
    StoreError: "try again; if it stays, see crowdlayer/docs/troubleshooting.md, 74",
    DeviceMemoryError: "lower BATCH_SIZE or IMG_SIZE, or take a smaller MODEL",
}
STEPS = 4
"""Training steps that are timed; the first does not count. On a GPU twice as many, of which the first are slower."""
NEARLY_ALL = 0.9
"""A share of the memory above which a longer run may not stay below."""


@dataclass(frozen=True)
class Row:
    """What was looked at, how it is, what was found, and what helps."""

    what: str
    state: State
    found: str
    remedy: str = ""


@dataclass
class Table:
    """The rows so far, and the first error among them."""

    rows: list[Row] = field(default_factory=list)
    error: CrowdlayerError | None = None

    def ok(self, what: str, found: str) -> None:
        self.rows.append(Row(what, "ok", found))

    def warn(self, what: str, found: str, remedy: str = "") -> None:
        self.rows.append(Row(what, "warning", found, remedy))

    def note(self, what: str, found: str, trouble: str, remedy: str) -> None:
        """A row that is ok; with some `trouble` a warning that says it, too."""
        self.rows.append(Row(what, "warning", f"{found}; {trouble}", remedy) if trouble else Row(what, "ok", found))

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` gives; or None and a row with its error."""
        try:
            return work()
        except CrowdlayerError as error:
            self.rows.append(Row(what, "error", one_line(str(error)), REMEDIES.get(type(error), "")))
            self.error = self.error or error
            return None

    def show(self) -> None:
        """The table in the log: a line per row; in JSON `check`, `state`, `found` and `remedy`."""
        width = max(len(row.what) for row in self.rows)
        for row in self.rows:
            remedy = f": {row.remedy}" if row.remedy else ""
            fields = {"check": row.what, "state": row.state, "found": row.found, "remedy": row.remedy}
            log.log(LEVELS[row.state], "%-7s  %-*s  %s%s", row.state, width, row.what, row.found, remedy, extra=fields)
        count = {state: sum(row.state == state for row in self.rows) for state in LEVELS}
        log.info("check %s: %d ok, %d warnings, %d errors", "failed" if self.error else "passed", *count.values())


def check(settings: Settings) -> None:
    """Look at everything that a run needs, but train; say it in a table.

    Raises:
        CrowdlayerError: the first error, when all that does not depend on it has been looked at too.
    """
    table = Table()
    named = sorted(settings.model_fields_set)
    table.ok("settings", f"{len(named)} set ({', '.join(name.upper() for name in named)}), the others as they are")
    launch = table.attempt("nodes", lambda: _nodes(table, settings))
    if launch is not None and not launch.leads:
        return  # the first of its node looks for all of them
    table.attempt("model", lambda: _model(table, settings))
    with working_folder(workdir_of(settings.workdir, launch or Launch())) as workdir:
        table.attempt("output", lambda: _output(table, settings, launch or Launch(), workdir))
        phases = Phases()
        inputs = table.attempt("data set", lambda: _inputs(table, settings, workdir, phases))
        if inputs is not None:
            table.attempt("resume", lambda: _resume(table, settings, inputs, workdir))
            found = table.attempt("images", lambda: _images(table, settings, inputs, workdir, phases))
            table.attempt("disk", lambda: _disk(table, settings, inputs.dataset, workdir))
            if found is not None:
                dataset, images = found
                for warning in advice.before(dataset, settings):
                    table.warn("advice", *warning.split(": consider ", 1))
                here, nodes = (1, 1) if launch is None else (_processes(settings, launch), launch.n_nodes)
                table.attempt(
                    "devices", lambda: _rehearse(table, settings, dataset, images, inputs, here, nodes, phases)
                )
    table.show()
    if table.error is not None:
        raise table.error


def _nodes(table: Table, settings: Settings) -> Launch:
    launch = recognise()
    table.ok("nodes", f"{launch}; {processes_to_start(settings, launch)} training processes here")
    return launch


def _processes(settings: Settings, launch: Launch) -> int:
    """How many will train on this node, whoever starts them."""
    return processes_to_start(settings, launch) if launch.peers is None else launch.peers.local_world


def _model(table: Table, settings: Settings) -> None:
    check_possible(settings, settings.export, settings.workdir)
    weights = "random weights" if settings.pretrained is False else "given weights"
    exports = f"; can be exported as {', '.join(settings.export)}" if settings.export else ""
    table.ok("model", f"{settings.model} takes images of {settings.img_size} pixels, {weights}{exports}")


def _output(table: Table, settings: Settings, launch: Launch, workdir: Path) -> None:
    check_places(settings)
    output = place(settings.output_location)
    if launch.publishes:  # of two who look at once each would delete the other's object
        probe(output, settings.output_name, workdir)
        table.ok("output", f"{output.location}: an object was written, read back and deleted")


def _inputs(table: Table, settings: Settings, workdir: Path, phases: Phases) -> Inputs:
    must_be_there(settings.tasks)
    inputs = read_inputs(settings, workdir, phases)
    counts = summary(inputs.dataset)
    found = (
        f"{counts['n_tasks']} tasks, {counts['n_answers']} answers, {counts['n_workers']} workers, "
        f"{counts['n_classes']} classes; synced in {duration(phases.seconds['sync'])}"
    )
    left_out = [f"{count} {what.replace('_', ' ')}" for what, count in inputs.dataset.left_out.items() if count]
    trouble = f"left out: {', '.join(left_out)}" if left_out else ""
    table.note("data set", found, trouble, "crowdlayer/docs/data-set.md has the rules")
    return inputs


def _resume(table: Table, settings: Settings, inputs: Inputs, workdir: Path) -> None:
    """Whether there is something to go on from; never removes what is there."""
    output, identity = place(settings.output_location), Identity(settings.model_dump(mode="json"), inputs.digest)
    if done_before(output, settings.output_name, identity.settings, inputs.digest):
        table.warn(
            "resume", "this very run was already done, a run would do nothing", "another OUTPUT_NAME for another"
        )
    elif settings.resume == "never":
        table.ok("resume", "a run would begin")
    else:
        with disk_errors(str(workdir)), tempfile.TemporaryDirectory(dir=workdir) as folder:
            found = Checkpoints(output, settings.output_name).find(identity, settings.resume, Path(folder))
        table.ok("resume", f"a run would go on from checkpoint {found.number}" if found.parts else "a run would begin")


def _images(table: Table, settings: Settings, inputs: Inputs, workdir: Path, phases: Phases) -> tuple[Dataset, Images]:
    with phases("decode"):
        dataset, images = load_images(
            inputs.dataset, inputs.synced.root, settings, settings.max_bad_images, workdir, inputs.synced.digests
        )
    n = sum(len(part) for part in (images.train, images.validation, images.test) if part is not None)
    found = f"{n} decoded in {duration(phases.seconds['decode'])}"
    first = next((f"{name}: {reason}" for name, reason in dataset.broken.items()), "")
    trouble = f"{len(dataset.broken)} are broken, {first}" if first else ""
    table.note("images", found, trouble, "mend or remove them")
    return dataset, images


def _disk(table: Table, settings: Settings, dataset: Dataset, workdir: Path) -> None:
    free, wanted = shutil.disk_usage(workdir).free, checkpoints_size(settings, dataset)
    found = f"{free / 1e9:.1f} GB free at {settings.workdir or 'TMPDIR'} with data and decoded images there"
    trouble = f"checkpoints may take {wanted / 1e9:.1f} GB" if free < wanted else ""
    table.note("disk", found, trouble, "a larger disk, or WORKDIR on another")


class _EnoughError(Exception):
    """The steps that were to be timed are done."""


class _Stopwatch(Watch):
    """Notes the time before each step, and ends after the last of `steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []

    def stop(self) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        return len(self.times) > self.steps

    def stopped(self, trainer: Trainer) -> NoReturn:
        raise _EnoughError


def _rehearse(
    table: Table,
    settings: Settings,
    dataset: Dataset,
    images: Images,
    inputs: Inputs,
    here: int,
    nodes: int,
    phases: Phases,
) -> None:
    """A few steps on one device, with the share of a step that each of the `here` processes on a node has."""
    n_processes = here * nodes
    share = settings.model_copy(update={"batch_size": -(-settings.batch_size // n_processes)})
    as_alone()
    bound_to_container()
    with enough_memory(settings):
        trainer = Experiment(dataset, images, share, inputs.weights or settings.pretrained is True).trainer()
        watch = trainer.watch = _Stopwatch(2 * STEPS if torch.cuda.is_available() else STEPS)
        try:
            trainer.train_epoch(trainer.learner, trainer.train, Progress())
        except _EnoughError:
            pass
        else:
            watch.stop()  # an epoch of fewer steps
        trainer.watch = Watch()
        few = images.validation[: EVALUATION_BATCHES * share.batch_size]
        started = time.monotonic()
        trainer.predict(few)
        seconds_each = (time.monotonic() - started) / len(few)
    device = trainer.accelerator.device
    weights = f"{sum(weight.numel() for weight in trainer.classifier.parameters()) / 1e6:.1f} million weights"
    computes = f"{device_name(device)}{driver()}, torch {torch.__version__}, precision {precision(settings)}"
    table.ok("devices", f"{computes}, {weights}")
    _memory(table, device, dataset, here)
    lasted = [after - before for before, after in itertools.pairwise(watch.times)]
    step = statistics.median(lasted[1:] or lasted)
    n_steps = -(-len(dataset.train.names) // settings.batch_size)
    epoch = n_steps * step + len(images.validation) * seconds_each / n_processes
    ready = phases.seconds["sync"] + phases.seconds["decode"]
    runs = 1 + max(settings.folds - 1, 0) + len(settings.baselines)  # a fold's has a share less, all together one
    further = " and ".join(name.upper() for name in ("folds", "baselines") if getattr(settings, name))
    table.ok(
        "time",
        f"about {duration(ready + runs * settings.n_epochs * epoch)}: {settings.n_epochs} epochs of {n_steps} steps, "
        f"{duration(epoch)} each{f', {runs} times ({further})' if runs > 1 else ''}; measured on {len(lasted)} steps",
    )


def _memory(table: Table, device: torch.device, dataset: Dataset, here: int) -> None:
    """The most that a step takes and that the evaluation will, against all that there is; a CPU's is all processes'."""
    used, there = device_memory(device)
    if device.type == "cpu":
        used *= here
    _compare(table, "memory", used, there, "a step", REMEDIES[DeviceMemoryError])
    matrices, size = matrices_of(dataset)
    there = used_memory()[1]
    _compare(table, "evaluation", here * (there - free_memory() + size), there, matrices, LESS)


def _compare(table: Table, what: str, used: int, there: int, by: str, remedy: str) -> None:
    found = f"{used / 1e9:.1f} of {there / 1e9:.1f} GB used by {by}"
    if used > NEARLY_ALL * there:
        table.warn(what, found, remedy)
    else:
        table.ok(what, found)
