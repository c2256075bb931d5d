"""A case of the catalogue: what is spoiled of a good data set, and how the job ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Spoil = Callable[[Path], object]
"""Changes the good data set in a folder."""


@dataclass(frozen=True)
class Case:
    """What is wrong, and how the job ends: `told` and `shown` are in its last line, or in the log if it ends well."""

    name: str
    code: int
    told: str
    settings: Mapping[str, str] = field(default_factory=dict)
    spoil: Spoil = lambda data: None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    shown: str = ""


def both(*spoils: Spoil) -> Spoil:
    def spoil(data: Path) -> None:
        for each in spoils:
            each(data)

    return spoil


def put(path: Path, body: str | bytes) -> None:
    path.write_bytes(body.encode() if isinstance(body, str) else body)
