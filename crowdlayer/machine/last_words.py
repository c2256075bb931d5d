"""Why a process has ended, left in a folder for whoever has started it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import CrowdlayerError, InterruptedRunError, PeerError, one_line


@dataclass(frozen=True)
class LastWords:
    """A line and the exit code; `lost`: another process was gone, which has a better reason."""

    line: str
    code: int
    lost: bool = False

    @classmethod
    def of(cls, error: CrowdlayerError | InterruptedRunError) -> LastWords:
        return cls(one_line(str(error)), error.exit_code, isinstance(error, PeerError))

    def write(self, folder: Path, rank: int) -> None:
        (folder / f"failed-{rank}.json").write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, folder: Path, rank: int) -> LastWords | None:
        """None where it left none: it was killed."""
        try:
            return msgspec.json.decode((folder / f"failed-{rank}.json").read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return None
