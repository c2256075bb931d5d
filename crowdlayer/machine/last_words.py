"""Why a process has ended: left in a folder for whoever has started it, told the others of a run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ..errors import (
    CrowdlayerError,
    DeviceMemoryError,
    EndedError,
    InterruptedRunError,
    PeerError,
    one_line,
)
from ..masking import without_secrets
from ..streams import say
from . import interruption
from .memory import too_little


@dataclass(frozen=True)
class LastWords:
    """A line and the exit code; `lost`: another process was gone, which has a better reason; `by`: who says so."""

    line: str
    code: int
    lost: bool = False
    by: str = ""

    @classmethod
    def of(cls, error: BaseException) -> LastWords:
        """What to say of any error: the one place that gives it its exit code."""
        match error:
            case CrowdlayerError() | InterruptedRunError():
                return cls(one_line(str(error)), error.exit_code, isinstance(error, PeerError))
            case MemoryError():
                return cls(too_little(error), DeviceMemoryError.exit_code)
            case _:
                return cls(f"a fault of the program: {type(error).__name__}: {one_line(str(error))}", 70)

    @classmethod
    def told(cls, raw: bytes) -> LastWords:
        """What another process has told: a failure, whatever it says; anybody may write where they meet."""
        try:
            words = msgspec.json.decode(raw, type=cls)
        except msgspec.DecodeError:
            words = cls("it has ended, and what it says of it cannot be read", 0)
        return words if 0 < words.code < 256 else replace(words, code=PeerError.exit_code)

    def of_another(self) -> EndedError | InterruptedRunError:
        """What they are for those who hear them."""
        line = f"{self.by}: {self.line}"
        return InterruptedRunError(line) if self.code == InterruptedRunError.exit_code else EndedError(line, self.code)

    def write(self, folder: Path, rank: int) -> None:
        """Leave them; where the disk takes none, which may be the very reason, the exit code alone says it."""
        try:
            (folder / f"failed-{rank}.json").write_bytes(msgspec.json.encode(self))
        except OSError:
            say(self.line, sys.stderr)

    @classmethod
    def read(cls, folder: Path, rank: int) -> LastWords | None:
        """None where it left none: it was killed."""
        try:
            return msgspec.json.decode((folder / f"failed-{rank}.json").read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return None


def ending(work: Callable[[], object]) -> tuple[LastWords | None, str]:
    """Do the work; how that ends: no last words where all goes well, and a traceback for a fault of the program alone.

    A signal may come with the failure, and is the reason then; one that comes later changes nothing.
    """
    failure: BaseException | None = None
    try:
        try:
            work()
        except BaseException as error:  # the one place that sees everything
            failure = error
        interruption.over()
    except InterruptedRunError as error:  # it comes once
        failure = failure or error
    if failure is None:
        return None, ""
    ours = isinstance(failure, CrowdlayerError | InterruptedRunError | MemoryError)
    trace = "" if ours else without_secrets("".join(traceback.format_exception(failure))).rstrip("\n")
    return LastWords.of(failure), trace
