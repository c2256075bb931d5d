"""check → sync → train → publish: where storage, training and publishing meet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .data.dataset import Dataset
from .errors import InterruptedRunError, SettingsError, together
from .inputs import Inputs, check_places, check_possible, probe, processes_to_start, read_inputs
from .learning.checkpoint import Checkpoints, Found
from .learning.experiment import Images, Phases
from .learning.spool import Identity, Spool
from .learning.uploads import Uploads
from .machine.launch import Launch, array_index, recognise
from .machine.lead import Lead
from .machine.meeting import Meeting
from .machine.processes import over_nccl
from .machine.supervisor import supervise
from .report.publishing import publish
from .report.results import Finished, Provenance, done_before, results_name, tell
from .run_folder import DRY_RUN, RUN, SPOOL, STAGED, forget_kept, kept, put_kept, run_folder, workdir_of
from .settings import Settings
from .storage.files import disk_errors
from .storage.handover import hand, take
from .storage.places import Place, place
from .storage.workdir import working_folder
from .training import PLAN, TRAINED, Plan, Trained, train_together
from .training import train as train_alone

log = logging.getLogger(__name__)

NOTHING = ""
"""Told instead of the folder of a plan: there is nothing to do."""


@dataclass(frozen=True)
class Start:
    """A start of the job on this node: where its first process works, and with whom.

    `folder` is the run's own in `workdir`; `n_processes` are to be started here.
    """

    settings: Settings
    launch: Launch
    lead: Lead
    n_processes: int
    workdir: Path
    folder: Path
    phases: Phases


def train(settings: Settings) -> str:
    """Do the job; returns the location of the results, and nothing on nodes and processes that do not put them."""
    launch = recognise()
    if not launch.leads:
        _follow(settings, launch)
        return ""
    if settings.sweep_index is not None and settings.sweep:
        log.info("entry %d of %d of SWEEP: %s", settings.sweep_index, len(settings.sweep), settings.output_name)
    if not settings.sweep and (element := array_index()) is not None and element[0] != "SLURM_ARRAY_TASK_ID":
        name = settings.output_name  # in Slurm a script may have given each its own
        log.warning("%s=%d without SWEEP: all elements of the array put OUTPUT_NAME=%s", *element, name)
    output = place(settings.output_location)
    with _started(settings, launch, RUN) as start:
        return _run(start, output)


def dry_run(settings: Settings) -> None:
    """One step, forward and backward, on every device of every node, and an evaluation; nothing is put anywhere.

    The tasks are as many as a step has, the workers all: what memory it takes, a run takes.
    """
    launch = recognise()
    if not launch.leads:
        _follow(settings, launch)
        return
    with _started(settings, launch, DRY_RUN) as start:
        inputs = read_inputs(settings, start.workdir, start.phases)
        one = settings.model_copy(
            update={"n_epochs": 1, "checkpoint_every": 0, "folds": 0, "baselines": (), "guard": False}
        )
        synced, few = inputs.synced, inputs.dataset.first(settings.batch_size)
        spool = Spool(start.folder / SPOOL, Identity(one.model_dump(mode="json"), inputs.digest))
        cache = start.folder  # not that of a run's images
        plan = Plan(one, few, synced.root, synced.digests, inputs.weights, cache, spool, Found().parts, tracked=False)
        trained = _train(start, plan, plan.images())
        with start.lead.publishing():
            if trained is not None:
                log.info("dry run passed: a step on %s", ", ".join(trained.devices))


@contextmanager
def _started(settings: Settings, launch: Launch, name: str) -> Iterator[Start]:
    """Refuse what cannot work, then hold WORKDIR, the run's folder there and the place where processes meet."""
    with Lead(launch, settings.timeout) as lead:  # first: why this node cannot start is a reason for the others, too
        together(lambda: check_places(settings), lambda: check_possible(settings, settings.export, settings.workdir))
        n_processes = processes_to_start(settings, launch)
        with working_folder(workdir_of(settings.workdir, launch)) as workdir, run_folder(workdir, name) as folder:
            yield Start(settings, launch, lead, n_processes, workdir, folder, Phases())


def _run(start: Start, output: Place) -> str:
    """Read the inputs; train and publish, unless that was done before."""
    settings, publishes = start.settings, start.launch.publishes
    results = results_name(settings.output_name)
    fresh = output.find(results) is None
    if fresh and publishes:  # where results are, a run could write, and this one may have nothing to do
        probe(output, settings.output_name, start.workdir)
    inputs = read_inputs(settings, start.workdir, start.phases)
    identity = Identity(settings.model_dump(mode="json"), inputs.digest)
    checkpoints = Checkpoints(output, settings.output_name)
    if done_before(output, settings.output_name, identity.settings, inputs.digest):
        log.info("this very run was already done: nothing to do")
        _nothing_to_do(start)
    else:
        if publishes and not fresh:
            probe(output, settings.output_name, start.workdir)
        _train_and_publish(start, inputs, identity, checkpoints)
    forget_kept(start.workdir, identity)
    if not publishes:
        return ""
    if checkpoints.are_of(identity):  # another run of this name may have been interrupted meanwhile
        checkpoints.remove()
    return f"{output.location}/{results}"


def _train_and_publish(start: Start, inputs: Inputs, identity: Identity, checkpoints: Checkpoints) -> None:
    """From the newest checkpoint to the results; the node that publishes puts checkpoints meanwhile."""
    settings, publishes, found = start.settings, start.launch.publishes, Found()
    if publishes:
        if settings.resume != "never":
            put_kept(start.workdir, checkpoints, identity)
        found = checkpoints.find(identity, settings.resume, start.folder)
    spool = Spool(start.folder / SPOOL, identity, found.number)
    synced = inputs.synced
    plan = Plan(
        settings, inputs.dataset, synced.root, synced.digests, inputs.weights, start.workdir, spool, found.parts
    )
    keep_in, put_to = workdir_of(settings.workdir, start.launch), checkpoints if publishes else None
    with kept(start.folder, keep_in, identity), _putting(spool, put_to, settings):
        with start.phases("decode"):
            decoded = plan.images()
        trained = _train(start, plan, decoded)
        with start.lead.publishing():
            if publishes and trained is not None:
                _publish(start, trained, decoded[1], checkpoints.output, identity)


@contextmanager
def _putting(spool: Spool, checkpoints: Checkpoints | None, settings: Settings) -> Iterator[None]:
    """Put the spool's checkpoints, if this node does; say of an interrupted run where its last one is."""
    if checkpoints is None:
        yield
        return
    with Uploads(spool.folder, checkpoints, background=settings.checkpoint_every > 0) as uploads:
        try:
            yield
        except InterruptedRunError as error:
            saved = uploads.finish()
            if saved is None:
                raise
            where = f"{checkpoints.output.location}/{checkpoints.prefix}/{saved}"
            raise InterruptedRunError(f"{error}; the checkpoint is at {where}") from None


def _train(start: Start, plan: Plan, decoded: tuple[Dataset, Images]) -> Trained | None:
    """Train in this very process; or, when there are more, in processes of their own: the first node's tell it."""
    launch, phases = start.launch, start.phases
    if start.n_processes * launch.n_nodes == 1 and launch.peers is None:
        return train_alone(plan, decoded, phases)
    hand(plan, start.folder / PLAN)
    if launch.peers is not None:
        meeting = start.lead.ready()
        meeting.tell(_plan_of(launch), str(start.folder))
        return train_together(plan, phases, meeting, launch, launch.peers)
    log.info("%s: %d training processes here", launch, start.n_processes)
    with phases("processes"):
        meeting = start.lead.ready()
        _as_many_everywhere(start.n_processes, meeting)
        timeout, nccl = plan.settings.timeout, over_nccl()
        supervise("process", start.folder, start.n_processes, launch, meeting.port, timeout, nccl, start.lead.reason)
    return take(start.folder / TRAINED, Trained) if launch.publishes else None


def _as_many_everywhere(n: int, meeting: Meeting) -> None:
    """Refuse nodes with unlike numbers of processes: each counts on as many on all, and would wait for those."""
    if (theirs := meeting.first_said("processes per node", str(n))) != str(n):
        raise SettingsError(f"N_PROCESSES: must be the same on all nodes, is {n} here and {theirs} on another")


def _follow(settings: Settings, launch: Launch) -> None:
    """Train by the plan of this node's first process, which syncs the data."""
    assert launch.peers is not None
    meeting = Meeting.join(launch, settings.timeout)
    with meeting.accounted():
        folder = meeting.told(_plan_of(launch))
        if folder == NOTHING:
            meeting.part(launch.attendance, host=False)
        else:
            train_together(take(Path(folder) / PLAN, Plan), Phases(), meeting, launch, launch.peers)
            meeting.published(launch.attendance)


def _nothing_to_do(start: Start) -> None:
    """Tell it the processes that wait for a plan of this one."""
    launch = start.launch
    if launch.peers is not None:
        meeting = start.lead.ready()
        meeting.tell(_plan_of(launch), NOTHING)
        meeting.part(launch.attendance, launch.publishes)


def _plan_of(launch: Launch) -> str:
    return f"plan of node {launch.node}"


def _publish(start: Start, trained: Trained, images: Images, output: Place, identity: Identity) -> None:
    """Put the results, and say what they are."""
    name, phases = start.settings.output_name, start.phases
    phases.seconds |= trained.seconds
    sources = dict.fromkeys(start.settings.model_fields_set, "environment")
    provenance = Provenance(identity.settings, identity.data_digest, trained.devices, trained.small_stem, sources)
    staged = start.folder / STAGED
    with disk_errors(str(staged)):
        staged.mkdir()
    results = publish(output, staged, Finished(trained.dataset, images, trained.outcome, provenance), phases)
    seconds = "  ".join(f"{phase} {spent:.1f} s" for phase, spent in phases.seconds.items())
    tell(results, start.settings)
    log.info("results at %s/%s  (%s)", output.location, results_name(name), seconds)
