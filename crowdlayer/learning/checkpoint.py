"""The state of a run, saved so that it is found whole or not at all.

A checkpoint is an index and the parts that it names by their SHA-256. Training writes it to a spool, a folder on this
machine; from there it goes to `<output>/checkpoints/<name>/`, parts first and the index last, while training goes on.
A part that has not changed, the best weights of an earlier epoch, is not put again.

    <number>.json    format, epoch, step, settings, digest of the data, {part: [file, size]}
    <sha256>.pt      tensors and plain values; torch.load(weights_only=True) reads it
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from ..errors import CrowdlayerError, SettingsError, StoreError, listed, one_line, short
from ..settings import influential
from ..storage.files import Stored, disk_errors, file_digest, size_of
from ..storage.places import Place
from .tensors import read_tensors

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the index and the parts; a checkpoint of another format is left alone."""
KEPT = 2
"""Checkpoints kept: the newest, and the one before, should the newest not be whole."""
PARTS = ("best", "run")
INDEX = re.compile(r"\d{8}\.json")
PART = re.compile(r"[0-9a-f]{64}\.pt")
LARGEST_INDEX = 64 * 2**20
"""Bytes; the names of 10^5 classes are 2 MB."""
POLL = 0.1
"""Seconds between looks into the spool."""


@dataclass(frozen=True)
class Identity:
    """What a run is of: its settings, and the digest of its data. A checkpoint of another run is none of this one."""

    settings: dict[str, Any]
    data_digest: str

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


# --- on this machine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spool:
    """Where training leaves its checkpoints."""

    folder: Path
    identity: Identity
    last: int = 0
    """The number of the checkpoint that the run goes on from."""

    def write(self, state: dict[str, Any]) -> None:
        """Leave `state` here: whole, or not under its name. The best weights are a part of their own.

        What was left before and nobody has taken is removed: a store that is slower than the epochs, or away, must not
        fill the disk. Nothing is flushed to it, for training waits meanwhile: a power loss may tear what is here, and
        whoever finds it compares the digests. What is in the output is flushed.
        """
        progress = state["progress"]
        contents = {"best": state["best"], "run": {name: part for name, part in state.items() if name != "best"}}
        with disk_errors(str(self.folder)):
            parts = {name: self._write_part(content) for name, content in contents.items()}
            index = {
                "format": FORMAT,
                "epoch": progress["epoch"],
                "step": progress["step"],
                "settings": influential(self.identity.settings),
                "data_digest": self.identity.data_digest,
                "parts": parts,
            }
            beside = self.folder / "index"
            beside.write_text(json.dumps(index))
            number = max([self.last, *map(_number, _indexes(self.folder))]) + 1
            newest = self.folder / f"{number:08d}.json"
            beside.replace(newest)
            kept = {newest.name, *(file for file, _ in parts.values())}
            for path in self.folder.iterdir():
                if path.is_file() and path.name not in kept:
                    path.unlink(missing_ok=True)

    def _write_part(self, content: object) -> tuple[str, int]:
        beside = self.folder / "part"
        try:
            torch.save(content, beside)
        except RuntimeError as error:  # torch's word for a full disk
            free = shutil.disk_usage(self.folder).free / 1e6
            said = f"{self.folder}: a checkpoint must be written whole, with {free:.0f} MB of disk free it is not"
            raise StoreError(f"{said}: {one_line(str(error))}") from error
        name = f"{file_digest(beside)}.pt"
        size = beside.stat().st_size
        beside.replace(self.folder / name)
        return name, size


def read_state(parts: Mapping[str, bytes]) -> dict[str, Any]:
    """The state that these parts make."""
    best, run = (read_tensors(io.BytesIO(parts[name])) for name in PARTS)
    return {**run, "best": best}


@contextmanager
def going_on() -> Iterator[None]:
    """Around the reading and the use of a state: say that it is none of this program's where that fails.

    It is what its index says, by its SHA-256, so it is not torn: somebody else wrote both.

    Raises:
        SettingsError: for whatever is wrong; nothing is sure of such a state.
    """
    try:
        yield
    except (CrowdlayerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = short(str(error), 300) or type(error).__name__
        raise SettingsError(
            f"RESUME: the checkpoint must be one that this program wrote, it is not: {said}; never starts afresh"
        ) from error


# --- in the output ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run goes on from: its number, and its parts on this machine; none where it begins."""

    number: int = 0
    parts: Mapping[str, Path] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of the runs of one name in an output."""

    def __init__(self, output: Place, output_name: str) -> None:
        self.output = output
        self.prefix = f"checkpoints/{output_name}"

    def find(self, identity: Identity, resume: Literal["auto", "never", "must"], folder: Path) -> Found:
        """Bring the parts of the newest whole checkpoint into `folder`; none for a run that begins.

        With `resume` "never" those that are there are removed: the run is not theirs.

        Raises:
            SettingsError: it is another run's; or there must be one and is none.
        """
        if resume == "never":
            self.remove()
            return Found()
        for name in sorted(
            (stored.name for stored in self.output.below(self.prefix) if _is_index(stored)), reverse=True
        ):
            index = self._index(name)
            if index is None:
                log.warning("checkpoint %s is of another program or format, or torn: left out", name)
                continue
            if differences := identity.differences(index):
                raise SettingsError(
                    f"RESUME: {self.output.location}/{name} must be this run's: {listed(differences)}; "
                    "never starts afresh, and another OUTPUT_NAME leaves it alone"
                )
            parts = self._bring(index, folder)
            if parts is None:
                log.warning("checkpoint %s is torn: left out", name)
                continue
            log.info("going on from checkpoint %s", name)
            return Found(_number(name), parts)
        if resume == "must":
            where = f"{self.output.location}/{self.prefix}"
            raise SettingsError(f"RESUME: must find a checkpoint at {where}, there is none that is whole")
        return Found()

    def put_kept(self, spool: Path, identity: Identity) -> bool:
        """Put the newest checkpoint of a spool that an earlier start has left, unless the output has a newer one.

        Returns:
            Whether it is whole and this run's, and needed no more.
        """
        name = next(reversed(_indexes(spool)), None) if spool.is_dir() else None
        index = None if name is None else _parsed((spool / name).read_bytes())
        if name is None or index is None or identity.differences(index):
            return False
        files = [(spool / file, size) for file, size in index["parts"].values()]
        if any(size_of(file) != size or file_digest(file) != file.stem for file, size in files):
            return False
        there = [stored.name.rpartition("/")[2] for stored in self.output.below(self.prefix)]
        if name > max(filter(INDEX.fullmatch, there), default=""):
            log.info("checkpoint %s, kept on this machine by an earlier start, is put now", name)
            self.put(spool, name)
        return True

    def _index(self, name: str) -> dict[str, Any] | None:
        return _parsed(self.output.read(name))

    def _bring(self, index: dict[str, Any], folder: Path) -> dict[str, Path] | None:
        """The parts on this machine, each what its name says; None where one is missing or something else."""
        parts: dict[str, Path] = {}
        for part, (file, size) in index["parts"].items():
            stored = self.output.find(f"{self.prefix}/{file}")
            if stored is None or stored.size != size:
                return None
            parts[part] = folder / f"{part}.pt"
            with disk_errors(str(folder)), parts[part].open("w+b") as target:
                if f"{self.output.download(stored, target)}.pt" != file:
                    return None
        return parts

    def put(self, spool: Path, index_name: str) -> None:
        """Put a checkpoint of the spool, its index last; then remove what is older than the last two."""
        there = {stored.name: stored.size for stored in self.output.below(self.prefix)}
        for file, size in _parts(spool / index_name):
            if there.get(f"{self.prefix}/{file}") != size:
                self.output.upload(spool / file, f"{self.prefix}/{file}")
        self.output.upload(spool / index_name, f"{self.prefix}/{index_name}")
        indexes = sorted({n for n in there if INDEX.fullmatch(n.rpartition("/")[2])} | {f"{self.prefix}/{index_name}"})
        kept = set(indexes[-KEPT:])
        for name in indexes[-KEPT:]:
            index = self._index(name)
            kept |= {f"{self.prefix}/{file}" for file, _ in ([] if index is None else index["parts"].values())}
        for name in sorted(there.keys() - kept, key=_index_first):
            self.output.delete(name)

    def remove(self) -> None:
        """Leave nothing of them."""
        for name in sorted((stored.name for stored in self.output.below(self.prefix)), key=_index_first):
            self.output.delete(name)
        self.output.prune(self.prefix)


class Uploads:
    """Puts the checkpoints of a spool to the output in a thread of its own; only the newest of those that wait.

    An upload that fails is said and tried again with the next checkpoint: a store that is away for an hour must not end
    a training of days. The last one, of `finish`, must go well.
    """

    def __init__(self, spool: Path, checkpoints: Checkpoints, background: bool) -> None:
        """`background`: put them as they come; else `finish` alone puts one."""
        self._spool = spool
        self._taken = spool / "taken"
        self._checkpoints = checkpoints
        self._over = threading.Event()
        self._done: str | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True) if background else None

    def __enter__(self) -> Uploads:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._taken, ignore_errors=True)

    def stop(self) -> None:
        """No upload begins after this; one under way comes to its end."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> str | None:
        """Put the newest, unless that was done; the name of its index, None where there is none."""
        self.stop()
        self._put()
        return self._done

    def _work(self) -> None:
        while not self._over.wait(POLL):
            waiting = self._newest()
            try:
                self._put()
            except CrowdlayerError as error:
                log.warning("checkpoint %s could not be put, the next one may: %s", waiting, error)
                while not self._over.wait(POLL) and self._newest() == waiting:
                    pass

    def _put(self) -> None:
        newest = self._newest()
        if newest is not None and newest != self._done and self._take(newest):
            self._checkpoints.put(self._taken, newest)
            self._done = newest

    def _take(self, newest: str) -> bool:
        """Give the checkpoint names that training does not remove; False where it just has removed the first."""
        with disk_errors(str(self._taken)):
            shutil.rmtree(self._taken, ignore_errors=True)
            self._taken.mkdir()
            try:
                for file in (newest, *(file for file, _ in _parts(self._spool / newest))):
                    _second_name(self._spool / file, self._taken / file)
            except FileNotFoundError:
                return False
        return True

    def _newest(self) -> str | None:
        return next(reversed(_indexes(self._spool)), None)


def _parsed(raw: bytes | None) -> dict[str, Any] | None:
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


def _second_name(file: Path, name: Path) -> None:
    """The same file under another name, or a copy where the file system has no such names."""
    try:
        name.hardlink_to(file)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, name)


def _indexes(spool: Path) -> list[str]:
    """The names of the indexes in a spool, the newest last."""
    with disk_errors(str(spool)):
        return sorted(path.name for path in spool.iterdir() if INDEX.fullmatch(path.name))


def _is_index(stored: Stored) -> bool:
    return INDEX.fullmatch(stored.name.rpartition("/")[2]) is not None and stored.size <= LARGEST_INDEX


def _number(index: str) -> int:
    return int(Path(index).stem)


def _index_first(name: str) -> bool:
    """A sort key for removing: what an index names is there as long as the index is."""
    return not name.endswith(".json")


def _parts(index: Path) -> list[tuple[str, int]]:
    """File and size of each part, of an index that we have written."""
    return [(file, size) for file, size in json.loads(index.read_bytes())["parts"].values()]
