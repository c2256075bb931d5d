"""Data sets for the bench."""

from __future__ import annotations

import itertools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np

THEIR_NAMES = {"airplane": "plane", "automobile": "car"}
"""CIFAR's classes, where peerannot has names of its own."""


def renumbered(source: Path, folder: Path, n: int) -> Path:
    """The first `n` tasks of a data set (folder or zip), tasks and workers numbered from 0: so peerannot can read it.

    Where it has fewer they come again, and their answers with them. Classes get the names that peerannot has for them.
    """
    if folder.exists():
        return folder
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder.with_suffix(".whole"))  # ours, from ../shared
        source = folder.with_suffix(".whole")
    answers = json.loads((source / "answers.json").read_text())
    workers = {name: str(i) for i, name in enumerate(sorted({w for votes in answers.values() for w in votes}))}
    images = {path.stem.rpartition("-")[2]: path for path in sorted((source / "train").rglob("*.*"))}
    chosen = list(itertools.islice(itertools.cycle([task for task in answers if task in images]), n))
    renamed = {}
    for number, task in enumerate(chosen):
        path = images[task]
        target = folder / "train" / THEIR_NAMES.get(path.parent.name, path.parent.name) / f"image-{number}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        renamed[str(number)] = {workers[worker]: label for worker, label in answers[task].items()}
    for split in ("val", "test"):
        for path in sorted((source / split).rglob("*.*"))[::10]:
            target = folder / split / THEIR_NAMES.get(path.parent.name, path.parent.name) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (folder / "answers.json").write_text(json.dumps(renamed))
    classes = [THEIR_NAMES.get(path.name, path.name) for path in sorted((source / "train").iterdir())]
    (folder / "metadata.json").write_text(json.dumps({"classes": classes}))
    return folder


def many_answers(path: Path, n_tasks: int, per_task: int, n_workers: int) -> Path:
    """answers.json of simulated workers with names as long as Mechanical Turk's."""
    rng = np.random.default_rng(0)
    names = [f"A{number:013d}{worker:08x}TURK" for worker, number in enumerate(rng.integers(10**13, size=n_workers))]
    with path.open("w") as file:
        for task in range(n_tasks):
            first, labels = int(rng.integers(n_workers)), rng.integers(10, size=per_task)
            votes = ", ".join(f'"{names[(first + 31 * i) % n_workers]}": {label}' for i, label in enumerate(labels))
            file.write(f'{"{" if task == 0 else ", "}"{task}": {{{votes}}}')
        file.write("}")
    return path
