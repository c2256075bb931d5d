"""States of a run that are small, and where they are put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crowdlayer.learning.checkpoint import Checkpoints
from crowdlayer.learning.spool import Identity, Spool, read_state
from crowdlayer.storage.places import Place

SETTINGS: dict[str, Any] = {"lr": 0.1, "n_epochs": 5, "verbose": True}


def state(epoch: int, step: int = 0, best: int = 1) -> dict[str, Any]:
    return {
        "progress": {"epoch": epoch, "step": step, "total": torch.zeros(1)},
        "best": {"epoch": best, "classifier": {"w": torch.full((50,), float(best))}},
        "model": {"w": torch.full((100,), float(epoch))},
    }


def put(output: Place, spool: Spool, *states: dict[str, Any]) -> Checkpoints:
    """Each of the states put as a checkpoint, one after the other."""
    checkpoints = Checkpoints(output, "run")
    for one in states:
        spool.write(one)
        checkpoints.put(spool.folder, max(path.name for path in spool.folder.glob("*.json")))
    return checkpoints


def found(checkpoints: Checkpoints, folder: Path, identity: Identity | None = None) -> dict[str, Any] | None:
    parts = checkpoints.find(identity or Identity(SETTINGS, "data"), "auto", folder).parts
    return read_state({name: path.read_bytes() for name, path in parts.items()}) if parts else None


def names(output: Place) -> list[str]:
    return sorted(stored.name.rpartition("/")[2] for stored in output.below("checkpoints/run"))


def new_spool(folder: Path) -> Spool:
    """An empty one in there."""
    (folder / "spool").mkdir()
    return Spool(folder / "spool", Identity(SETTINGS, "data"))
