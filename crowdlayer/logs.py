"""The log: lines on standard error, as text or as JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from .errors import one_line


class LineFormatter(logging.Formatter):
    """A line per record, whatever text of the data set is in it; only tracebacks have more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is logging's
        return one_line(super().formatMessage(record).rstrip("\n"))


def start(log_format: Literal["text", "json"]) -> None:
    """Send this package's log to standard error; other libraries' warnings too."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                datefmt="%Y-%m-%dT%H:%M:%S%z",
            )
        )
    else:
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("crowdlayer").setLevel(logging.INFO)
    logging.captureWarnings(True)


@contextmanager
def shown(verbose: bool) -> Iterator[logging.Logger]:
    """Show this package's log on standard error for a while, unless the program has set up logging itself."""
    log = logging.getLogger("crowdlayer")
    handler = logging.StreamHandler(sys.stderr)
    before = log.level
    ours = verbose and not log.hasHandlers()
    if ours:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
