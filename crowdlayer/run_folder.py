"""A run's folder in WORKDIR, and what earlier starts have left there: what a store that stayed away has not taken."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CrowdlayerError
from .learning.checkpoint import Checkpoints
from .learning.spool import Identity, newest_of
from .machine.launch import Launch
from .report.results import done_before
from .storage.durable import flush_disk
from .storage.files import disk_errors
from .storage.places import place

log = logging.getLogger(__name__)

STAGED, SPOOL = "results", "checkpoints"
"""Folders of a run: what is to be put to the output, and its checkpoints."""
RUN, DRY_RUN, KEPT = "run", "dry-run", "crowdlayer-kept-"
"""Folders of WORKDIR: this run's, and how those begin of runs that were killed or could not put all."""


def workdir_of(named: str | None, launch: Launch) -> str | None:
    """WORKDIR on this node: of several, each has a folder in it, for it may be on a file system that they share."""
    return named if named is None or launch.n_nodes == 1 else f"{named}/node-{launch.node}"


@contextmanager
def run_folder(workdir: Path, name: str) -> Iterator[Path]:
    """A folder of this run alone, for its user alone; a checkpoint that a killed run has left there is kept."""
    folder = workdir / name
    with disk_errors(str(workdir)):
        if name == RUN and any((folder / SPOOL).glob("*.json")):
            (folder / SPOOL).rename(Path(tempfile.mkdtemp(prefix=KEPT, dir=workdir)) / SPOOL)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        (folder / SPOOL).mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_kept(workdir: Path, checkpoints: Checkpoints, identity: Identity) -> None:
    """Put checkpoints of this run that earlier starts in this folder could not put: days of training are in them."""
    for folder in sorted(workdir.glob(f"{KEPT}*")):
        ours = os.access(folder, os.R_OK | os.X_OK)  # where a job ran as another user it stays
        if ours and checkpoints.put_kept(folder / SPOOL, identity):
            _remove(folder / SPOOL)


def forget_kept(workdir: Path, identity: Identity) -> None:
    """Remove what earlier starts of this very run have kept in this folder: it is done, or keeps the same anew."""
    name, settings, data = identity.settings["output_name"], identity.settings, identity.data_digest
    for folder in workdir.glob(f"{KEPT}*"):
        with suppress(OSError, CrowdlayerError):  # what cannot be read stays, and fails no run that is done
            if newest_of(folder / SPOOL, identity) is not None:
                _remove(folder / SPOOL)
            if done_before(place(str(folder / STAGED)), name, settings, data):
                _remove(folder / STAGED)


def _remove(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):  # the other part is there too
        part.parent.rmdir()


@contextmanager
def kept(folder: Path, workdir: str | None, identity: Identity) -> Iterator[None]:
    """Keep on this machine what a run that fails has not put to the output: days of training are in it.

    Results that are not whole come again from the last checkpoint.
    """
    try:
        yield
    except Exception:
        whole = {folder / STAGED: "results/*.json", folder / SPOOL: "*.json"}
        parts = [part for part, index in whole.items() if any(part.glob(index))]
        if parts:
            _keep(parts, workdir, identity)
        raise


def _keep(parts: Sequence[Path], workdir: str | None, identity: Identity) -> None:
    try:
        if workdir is not None:
            forget_kept(Path(workdir), identity)
        beside = Path(tempfile.mkdtemp(prefix=KEPT, dir=workdir))
        for part in parts:
            shutil.move(part, beside)
        flush_disk(beside)
    except OSError as error:  # a disk that is full for good; why the run failed is still to be said
        log.error("what was not put to the output could not be kept here either: %s", error)
        return
    log.error("what was not put to the output is kept in %s: %s",
              beside, " and ".join(f"{part.name}/" for part in parts))  # fmt: skip
