"""What is ours in a WORKDIR, and how a file comes to be there: whole, or not under its name."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..errors import SettingsError
from .files import Stored
from .places import Place


def claim(workdir: Path) -> None:
    """Mark the folder as ours; all that is removed later is below names that were free then.

    Raises:
        SettingsError: they are not free.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mark = workdir / ".crowdlayer"
    if mark.exists():
        return
    taken = [name for name in ("data", "files", "partial", "archive") if (workdir / name).exists()]
    if taken:
        raise SettingsError(f"WORKDIR: must be a folder for this job alone, {workdir} has {taken[0]}/ of another's")
    mark.touch()


def tidy(workdir: Path) -> None:
    """Remove what a killed sync left half done."""
    claim(workdir)
    for folder in ("partial", "archive"):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def remove(root: Path, name: str) -> None:
    """Remove a file and the folders that are empty without it: a file may come to be where they are."""
    (root / name).unlink(missing_ok=True)
    while name := name.rpartition("/")[0]:
        try:
            (root / name).rmdir()
        except OSError:
            return


def bring(source: Place, stored: Stored, target: Path, workdir: Path) -> str:
    """Into a nameless neighbour first: what bears the name is whole."""
    partial = workdir / "partial"
    partial.mkdir(exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=partial)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            digest = source.download(stored, file)
        _make_folder(target.parent, workdir)
        Path(beside).replace(target)
    finally:
        Path(beside).unlink(missing_ok=True)
    return digest


def _make_folder(folder: Path, workdir: Path) -> None:
    """Make it and those above it, but for WORKDIR, which is gone when the job has ended meanwhile."""
    if folder != workdir and not folder.is_dir():
        _make_folder(folder.parent, workdir)
        folder.mkdir(exist_ok=True)
