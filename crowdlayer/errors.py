"""What can go wrong, one type per exit code of the contract (sysexits' numbers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

SHOWN = 20
"""How many complaints of one kind are shown in full; the rest are counted."""


class CrowdlayerError(Exception):
    """Base of every error this package raises on purpose; its text is one line for the user."""

    exit_code: int = 70


class EndedError(CrowdlayerError):
    """A training process has failed, with an exit code of its own."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class DataError(CrowdlayerError):
    """The data set or the answers cannot be used: one complaint or many."""

    exit_code = 65

    def __init__(self, *complaints: str) -> None:
        super().__init__(listed(complaints))
        self.complaints = complaints


class DeviceMemoryError(CrowdlayerError):
    """Out of memory on the device."""

    exit_code = 71


class StoreError(CrowdlayerError):
    """The store or the disk failed, after the job's own retries."""

    exit_code = 74


class PeerError(StoreError):
    """Another process of the run is gone, or silent for too long: as with a store, another try may go well."""


class InterruptedRunError(KeyboardInterrupt):
    """A signal asked the run to stop. Not an Exception: botocore would take it for a failed request, and try again."""

    exit_code: int = 75


class AccessError(CrowdlayerError):
    """The store refused: credentials, permissions."""

    exit_code = 77


class SettingsError(CrowdlayerError):
    """A setting is missing, unknown or wrong."""

    exit_code = 78


class Complaints:
    """What is wrong with the data, gathered so that all of it can be said at once.

    `with complaints:` around a step keeps what it complains about; `close` says all of it.
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, DataError):
            return False
        self._found += error.complaints
        return True

    def close(self) -> None:
        """Say them.

        Raises:
            DataError: there are some.
        """
        if self._found:
            raise DataError(*self._found)


def together(*checks: Callable[[], object]) -> None:
    """Do all of them, whatever some complain about.

    Raises:
        SettingsError: with what all of them do.
    """
    found = []
    for check in checks:
        try:
            check()
        except SettingsError as error:
            found.append(str(error))
    if found:
        raise SettingsError(listed(found))


def listed(complaints: Sequence[str]) -> str:
    """All complaints in one line: the first `SHOWN` in full, the rest counted."""
    rest = len(complaints) - SHOWN
    return "; ".join(complaints[:SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def short(text: str, longest: int = 100) -> str:
    """`text` of the user's data for a message: one line, and not pages of it."""
    return one_line(text if len(text) <= longest else f"{text[:longest]}…")


def few(names: Sequence[str], shown: int = 12) -> str:
    """The first of the names, and how many more there are."""
    rest = f", … {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(short(name) for name in names[:shown]) + rest


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, which could forge a line of the log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
