"""The state of a run, saved so that it is found whole or not at all.

A checkpoint is an index and the parts that it names by their SHA-256. Training writes it to a spool, a folder on this
machine; from there it goes to `<output>/checkpoints/<name>/`, parts first and the index last, while training goes on.
A part that has not changed, the best weights of an earlier epoch, is not put again; nor is the run itself while folds
and baselines are trained.

    <number>.json    format, epoch, step, settings, digest of the data, {part: [file, size]}
    <sha256>.pt      tensors and plain values; torch.load(weights_only=True) reads it
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CrowdlayerError, SettingsError, short
from ..settings import influential
from ..storage.files import disk_errors, file_digest
from .tensors import out_of_memory, read_tensors, write_tensors

FORMAT = 4
"""Of the index and the parts; a checkpoint of another format is left alone."""
PARTS = ("best", "run", "further")
Parts = Mapping[str, tuple[str, int]]
"""File and size of each."""
INDEX = re.compile(r"0[0-9]{7}\.json")
"""A run has no ten million checkpoints; what has a date for a name is another program's."""
PART = re.compile(r"[0-9a-f]{64}\.pt")


@dataclass(frozen=True)
class Identity:
    """What a run is of: its settings, and the digest of its data. A checkpoint of another run is none of this one."""

    settings: dict[str, Any]
    data_digest: str

    def told(self) -> dict[str, Any]:
        """What others compare with theirs; plain values."""
        return {"settings": influential(self.settings), "data_digest": self.data_digest}

    def differences(self, index: Mapping[str, Any]) -> list[str]:
        """What the run of `index` has otherwise, a line each."""
        theirs, ours = index["settings"], influential(self.settings)

        def said(settings: Mapping[str, Any], name: str) -> str:
            return short(json.dumps(settings.get(name)))

        found = [
            f"{short(name.upper())} was {said(theirs, name)} and is {said(ours, name)}"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name) != ours.get(name)
        ]
        if index["data_digest"] != self.data_digest:
            found.append("the data is not the same")
        return found


@dataclass(frozen=True)
class Spool:
    """Where training leaves its checkpoints."""

    folder: Path
    identity: Identity
    last: int = 0
    """The number of the checkpoint that the run goes on from."""

    def write(self, state: dict[str, Any], before: Parts | None = None) -> Parts:
        """Leave `state` here: whole, or not under its name. Best weights and further trainings are parts of their own.

        What was left before and nobody has taken is removed: a store that is slower than the epochs, or away, must not
        fill the disk. Nothing is flushed to it, for training waits meanwhile: a power loss may tear what is here, and
        whoever finds it compares the digests. What is in the output is flushed.

        Args:
            before: those of the newest one's parts that are in `state` as they were there.

        Returns:
            The parts.
        """
        progress, before = state["progress"], before or {}
        contents = {name: state.get(name) for name in PARTS if name != "run"}
        contents["run"] = {name: part for name, part in state.items() if name not in PARTS}
        with disk_errors(str(self.folder)):
            parts = {name: before.get(name) or self._write_part(contents[name]) for name in PARTS}
            index = {
                "format": FORMAT,
                "epoch": progress["epoch"],
                "step": progress["step"],
                **self.identity.told(),
                "parts": parts,
            }
            beside = self.folder / "index"
            beside.write_text(json.dumps(index))
            next_number = max([self.last, *map(number, indexes(self.folder))]) + 1
            newest = self.folder / f"{next_number:08d}.json"
            beside.replace(newest)
            kept = {newest.name, *(file for file, _ in parts.values())}
            for path in self.folder.iterdir():
                if path.is_file() and path.name not in kept:
                    path.unlink(missing_ok=True)
        return parts

    def _write_part(self, content: object) -> tuple[str, int]:
        beside = self.folder / "checkpoint"
        write_tensors(content, beside)
        name = f"{file_digest(beside)}.pt"
        size = beside.stat().st_size
        beside.replace(self.folder / name)
        return name, size


def indexes(spool: Path) -> list[str]:
    """The names of the indexes in a spool, the newest last."""
    with disk_errors(str(spool)):
        return sorted(path.name for path in spool.iterdir() if INDEX.fullmatch(path.name))


def number(index: str) -> int:
    """Of a checkpoint, by the name of its index."""
    return int(Path(index).stem)


def parts_of(index: Path) -> list[tuple[str, int]]:
    """File and size of each part, of an index that we have written."""
    return [(file, size) for file, size in json.loads(index.read_bytes())["parts"].values()]


def parsed(raw: bytes | None) -> dict[str, Any] | None:
    """An index; None where it is torn, or of another program or format."""
    try:
        index = json.loads(raw or b"")
        parts = {part: (str(file), int(size)) for part, (file, size) in index["parts"].items()}
        whole = index["format"] == FORMAT and parts.keys() == set(PARTS)
        whole = whole and all(PART.fullmatch(file) for file, _ in parts.values())
        whole = whole and isinstance(index["settings"], dict) and isinstance(index["data_digest"], str)
        return index | {"parts": parts} if whole else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def newest_of(spool: Path, identity: Identity) -> str | None:
    """The name of the newest index in a spool that an earlier start has left, if it is there and this run's."""
    name = next(reversed(indexes(spool)), None) if spool.is_dir() else None
    index = None if name is None else parsed((spool / name).read_bytes())
    return None if index is None or identity.differences(index) else name


def read_state(parts: Mapping[str, bytes]) -> dict[str, Any]:
    """The state that these parts make."""
    content = {name: read_tensors(io.BytesIO(parts[name])) for name in PARTS}
    return {**content.pop("run"), **content}


@contextmanager
def going_on() -> Iterator[None]:
    """Around the reading and the use of a state: say that it is none of this program's where that fails.

    It is what its index says, by its SHA-256, so it is not torn: somebody else wrote both.

    Raises:
        SettingsError: for whatever is wrong; nothing is sure of such a state.
    """
    try:
        yield
    except CrowdlayerError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        said = short(str(error), 300) or type(error).__name__
        raise SettingsError(
            f"RESUME: the checkpoint must be one that this program wrote, it is not: {said}; never starts afresh"
        ) from error
