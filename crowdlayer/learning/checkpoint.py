"""The checkpoints of a run in its output."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import SettingsError, listed
from ..storage.durable import BESIDE
from ..storage.files import Stored, disk_errors, file_digest, size_of
from ..storage.places import Place
from .spool import INDEX, PART, Identity, newest_of, number, parsed, parts_of

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the newest, and the one before, should the newest not be whole."""
LARGEST_INDEX = 64 * 2**20
"""Bytes; the names of 10^5 classes are 2 MB."""


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
        names = self._indexes()
        for name in names:
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
            return Found(number(name), parts)
        if resume == "must":
            where = f"{self.output.location}/{self.prefix}"
            raise SettingsError(f"RESUME: must find a checkpoint at {where}, there is none that is whole")
        return Found(number(names[0]) if names else 0)  # newer than the torn ones are those to come

    def are_of(self, identity: Identity) -> bool:
        """Whether those that are there are this run's, by the newest that can be read; so they are if there is none."""
        found = (index for name in self._indexes() if (index := self._index(name)) is not None)
        newest = next(found, None)
        return newest is None or not identity.differences(newest)

    def put_kept(self, spool: Path, identity: Identity) -> bool:
        """Put the newest checkpoint of a spool that an earlier start has left, unless the output has a newer one.

        Returns:
            Whether it is whole and this run's, and needed no more.
        """
        name = newest_of(spool, identity)
        if name is None:
            return False
        files = [(spool / file, size) for file, size in parts_of(spool / name)]
        if any(size_of(file) != size or file_digest(file) != file.stem for file, size in files):
            return False
        if not self.are_of(identity):  # `find` refuses them; neither theirs nor these must go
            return False
        if name > max((stored.name.rpartition("/")[2] for stored in self._ours() if _is_index(stored)), default=""):
            log.info("checkpoint %s, kept on this machine by an earlier start, is put now", name)
            self.put(spool, name)
        return True

    def _ours(self) -> list[Stored]:
        """Indexes, parts, and what killed uploads have left: the folder may be another program's, too."""
        found = [(stored, stored.name.removeprefix(f"{self.prefix}/")) for stored in self.output.below(self.prefix)]
        return [stored for stored, name in found if any(kind.fullmatch(name) for kind in (INDEX, PART, BESIDE))]

    def _indexes(self) -> list[str]:
        """The names of those that are there, the newest first."""
        return sorted((stored.name for stored in self._ours() if _is_index(stored)), reverse=True)

    def _index(self, name: str) -> dict[str, Any] | None:
        return parsed(self.output.read(name))

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
        there = {stored.name: stored.size for stored in self._ours()}
        for file, size in parts_of(spool / index_name):
            if there.get(f"{self.prefix}/{file}") != size:
                self.output.upload(spool / file, f"{self.prefix}/{file}")
        self.output.upload(spool / index_name, f"{self.prefix}/{index_name}")
        numbered = sorted({n for n in there if INDEX.fullmatch(n.rpartition("/")[2])} | {f"{self.prefix}/{index_name}"})
        kept = set(numbered[-KEPT:])
        for name in numbered[-KEPT:]:
            index = self._index(name)
            kept |= {f"{self.prefix}/{file}" for file, _ in ([] if index is None else index["parts"].values())}
        for name in sorted(there.keys() - kept, key=_index_first):
            self.output.delete(name)

    def remove(self) -> None:
        """Leave nothing of them; what others have put beside them stays."""
        for name in sorted((stored.name for stored in self._ours()), key=_index_first):
            self.output.delete(name)
        self.output.prune(self.prefix)


def _is_index(stored: Stored) -> bool:
    return INDEX.fullmatch(stored.name.rpartition("/")[2]) is not None and stored.size <= LARGEST_INDEX


def _index_first(name: str) -> bool:
    """A sort key for removing: what an index names is there as long as the index is."""
    return not name.endswith(".json")
