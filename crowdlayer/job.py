"""check → sync → train → publish: the only place where storage meets training."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from .data.dataset import Dataset, belongs
from .errors import AccessError, InterruptedRunError, StoreError
from .inputs import check_possible, probe, processes_to_start, read_inputs
from .learning.checkpoint import Checkpoints, Found, Identity, Spool, Uploads
from .learning.experiment import Images, Phases
from .machine.launch import Launch, recognise
from .machine.meeting import Lead, Meeting
from .machine.supervisor import supervise
from .report.results import Provenance, done_before, headline, publish, results_name
from .settings import Settings
from .storage.files import disk_errors, working_folder
from .storage.handover import hand, take
from .storage.places import Place, place
from .storage.sync import must_be_there, must_stay_apart
from .training import PLAN, TRAINED, Plan, Trained, train_together
from .training import train as train_alone

log = logging.getLogger(__name__)

STAGED, SPOOL = "results", "checkpoints"
"""Folders of a run: what is to be put to the output, and its checkpoints."""
RUN, DRY_RUN, KILLED, KEPT = "run", "dry-run", "-killed", "crowdlayer-kept-"
"""Folders of WORKDIR: this run's; how that of one that was killed ends, and those begin that could not put all."""
NOTHING = ""
"""Told instead of the folder of a plan: there is nothing to do."""


def train(settings: Settings) -> str:
    """Do the job; returns the location of the results, and nothing on nodes and processes that do not put them."""
    launch = recognise()
    if not launch.leads:
        _follow(settings, launch)
        return ""
    phases = Phases()
    if settings.sweep_index is not None and settings.sweep:
        log.info("entry %d of %d of SWEEP: %s", settings.sweep_index, len(settings.sweep), settings.output_name)
    output = place(settings.output_location)
    location = f"{output.location}/{results_name(settings.output_name)}"
    must_be_there(settings.tasks)
    must_stay_apart(settings.tasks, {"OUTPUT": settings.output, "WORKDIR": settings.workdir}, belongs)
    check_possible(settings, settings.export)
    n_here = processes_to_start(settings, launch)
    lead = Lead(launch, settings.timeout)
    with lead, working_folder(settings.workdir) as workdir, _run_folder(workdir, RUN) as folder:
        fresh = output.find(results_name(settings.output_name)) is None
        if fresh and launch.publishes:  # where results are, a run could write, and this one may have nothing to do
            probe(output, settings.output_name, workdir)
        inputs = read_inputs(settings, workdir, phases)
        identity = Identity(settings.model_dump(mode="json"), inputs.digest)
        checkpoints = Checkpoints(output, settings.output_name)
        if done_before(output, settings.output_name, identity.settings, inputs.digest):
            log.info("this very run was already done: nothing to do")
            _nothing_to_do(launch, lead)
            if not launch.publishes:
                return ""
            checkpoints.remove()
            return location
        if not fresh and launch.publishes:
            probe(output, settings.output_name, workdir)
        if launch.publishes and settings.resume != "never":
            _put_kept(workdir, checkpoints, identity)
        found = checkpoints.find(identity, settings.resume, folder) if launch.publishes else Found()
        spool = Spool(folder / SPOOL, identity, found.number)
        synced = inputs.synced
        plan = Plan(settings, inputs.dataset, synced.root, synced.digests, inputs.weights, workdir, spool, found.parts)
        background = settings.checkpoint_every > 0
        uploading = Uploads(spool.folder, checkpoints, background) if launch.publishes else nullcontext()
        with _kept(folder, settings.workdir), uploading as uploads:
            try:
                with phases("decode"):
                    decoded = plan.images()
                trained = _train(plan, decoded, folder, launch, lead, n_here, phases)
                if trained is None or uploads is None:
                    return ""
                _publish(plan, trained, decoded[1], output, identity, folder, phases)
            except InterruptedRunError as error:
                saved = uploads.finish() if uploads is not None else None
                if saved is None:
                    raise
                where = f"{output.location}/{checkpoints.prefix}/{saved}"
                raise InterruptedRunError(f"{error}; the checkpoint is at {where}") from None
        checkpoints.remove()
    return location


def dry_run(settings: Settings) -> None:
    """One step, forward and backward, on every device of every node, and an evaluation; nothing is put anywhere.

    The tasks are as many as a step has, the workers all: what memory it takes, a run takes.
    """
    launch = recognise()
    if not launch.leads:
        _follow(settings, launch)
        return
    must_be_there(settings.tasks)
    check_possible(settings, settings.export)
    n_here = processes_to_start(settings, launch)
    lead = Lead(launch, settings.timeout)
    with lead, working_folder(settings.workdir) as workdir, _run_folder(workdir, DRY_RUN) as folder:
        phases = Phases()
        inputs = read_inputs(settings, workdir, phases)
        one = settings.model_copy(update={"n_epochs": 1, "checkpoint_every": 0, "baselines": (), "guard": False})
        synced, few = inputs.synced, inputs.dataset.first(settings.batch_size)
        spool = Spool(folder / SPOOL, Identity(one.model_dump(mode="json"), inputs.digest), 0)
        plan = Plan(one, few, synced.root, synced.digests, inputs.weights, folder, spool, {})  # its own cache
        trained = _train(plan, plan.images(), folder, launch, lead, n_here, phases)
        if trained is not None:
            log.info("dry run passed: a step on %s", ", ".join(trained.devices))


def _train(
    plan: Plan,
    decoded: tuple[Dataset, Images],
    folder: Path,
    launch: Launch,
    lead: Lead,
    n_here: int,
    phases: Phases,
) -> Trained | None:
    """Train in this very process; or, when there are more, in processes of their own: the first node's tell it."""
    if n_here * launch.n_nodes == 1 and launch.peers is None:
        return train_alone(plan, decoded, phases)
    hand(plan, folder / PLAN)
    if launch.peers is not None:
        meeting = lead.ready()
        meeting.tell(_plan_of(launch), str(folder))
        return train_together(plan, phases, meeting, launch, launch.peers)
    log.info("%s: %d training processes here", launch, n_here)
    with phases("processes"):
        meeting = lead.ready()
        supervise("process", folder, n_here, launch, meeting.port, plan.settings.timeout)
    return take(folder / TRAINED, Trained) if launch.publishes else None


def _follow(settings: Settings, launch: Launch) -> None:
    """Train by the plan of this node's first process, which syncs the data."""
    assert launch.peers is not None
    meeting = Meeting.join(launch, settings.timeout)
    folder = meeting.told(_plan_of(launch))
    if folder == NOTHING:
        meeting.part(launch.peers.world, host=False)
    else:
        train_together(take(Path(folder) / PLAN, Plan), Phases(), meeting, launch, launch.peers)


def _nothing_to_do(launch: Launch, lead: Lead) -> None:
    """Tell it the processes that wait for a plan of this one."""
    if launch.peers is not None:
        meeting = lead.ready()
        meeting.tell(_plan_of(launch), NOTHING)
        meeting.part(launch.peers.world, launch.publishes)


def _plan_of(launch: Launch) -> str:
    return f"plan of node {launch.node}"


def _publish(
    plan: Plan, trained: Trained, images: Images, output: Place, identity: Identity, folder: Path, phases: Phases
) -> None:
    """Put the results, and say what they are."""
    name = identity.settings["output_name"]
    phases.seconds |= trained.seconds
    sources = dict.fromkeys(plan.settings.model_fields_set, "environment")
    provenance = Provenance(identity.settings, identity.data_digest, trained.devices, trained.small_stem, sources)
    staged = folder / STAGED
    with disk_errors(str(folder)):
        staged.mkdir()
    results = publish(output, staged, name, trained.dataset, trained.outcome, images, provenance, phases)
    seconds = "  ".join(f"{phase} {spent:.1f} s" for phase, spent in phases.seconds.items())
    log.info(headline(results), extra={"seconds": phases.seconds})
    log.info("results at %s/%s  (%s)", output.location, results_name(name), seconds)


@contextmanager
def _run_folder(workdir: Path, name: str) -> Iterator[Path]:
    """A folder of this run alone, for its user alone; what a killed one has left lies beside it for as long."""
    folder, killed = workdir / name, workdir / f"{name}{KILLED}"
    with disk_errors(str(workdir)):
        shutil.rmtree(killed, ignore_errors=True)
        if folder.exists():
            folder.rename(killed)
        folder.mkdir(mode=0o700)
        (folder / SPOOL).mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(killed, ignore_errors=True)


def _put_kept(workdir: Path, checkpoints: Checkpoints, identity: Identity) -> None:
    """Put checkpoints of this run that earlier starts in this folder could not put: days of training are in them."""
    for folder in (workdir / f"{RUN}{KILLED}", *sorted(workdir.glob(f"{KEPT}*"))):
        if checkpoints.put_kept(folder / SPOOL, identity):
            shutil.rmtree(folder / SPOOL, ignore_errors=True)
            with suppress(OSError):  # the results of that start are there too
                folder.rmdir()


@contextmanager
def _kept(folder: Path, workdir: str | None) -> Iterator[None]:
    """Keep on this machine what cannot be put to the output: days of training are in it."""
    try:
        yield
    except (StoreError, AccessError):
        parts = [part for part in (folder / STAGED, folder / SPOOL) if part.is_dir() and any(part.iterdir())]
        if parts:
            _keep(parts, workdir)
        raise


def _keep(parts: Sequence[Path], workdir: str | None) -> None:
    try:
        kept = Path(tempfile.mkdtemp(prefix=KEPT, dir=workdir))
        for part in parts:
            shutil.move(part, kept)
    except OSError as error:  # a disk that is full for good; why the run failed is still to be said
        log.error("what could not be put to the output could not be kept here either: %s", error)
        return
    log.error("what could not be put to the output is kept in %s: %s",
              kept, " and ".join(f"{part.name}/" for part in parts))  # fmt: skip
