"""The log: lines on standard error, as text or as JSON, and how far a long piece of work is."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from pythonjsonlogger.json import JsonFormatter
from tqdm import tqdm

from .errors import one_line
from .masking import without_secrets

T = TypeVar("T")
log = logging.getLogger(__name__)

LINE_EVERY = 60.0
"""Seconds between two lines about the same piece of work, where there is no terminal to draw a bar on."""


class LineFormatter(logging.Formatter):
    """A line per record, whatever text of the data set is in it; only tracebacks have more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is logging's
        return one_line(super().formatMessage(record).rstrip("\n"))

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class JsonLines(JsonFormatter):
    """An object per record."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Without secrets; they are not looked for in the finished line, where a backslash before a quote is JSON's."""
        return {name: without_secrets(found) if isinstance(found, str) else found for name, found in log_data.items()}


class TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Lines above the bar that `track` draws."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # the terminal may be gone: as logging's own handlers, it costs the line and not the run
            self.handleError(record)


def start(log_format: Literal["text", "json"]) -> None:
    """Send this package's log to standard error; other libraries' warnings too."""
    at_terminal = log_format == "text" and sys.stderr.isatty()
    handler = (TerminalHandler if at_terminal else logging.StreamHandler)(sys.stderr)
    if log_format == "json":
        handler.setFormatter(
            JsonLines(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                datefmt="%Y-%m-%dT%H:%M:%S%z",
            )
        )
    else:
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
        handler.addFilter(lambda record: not hasattr(record, "exit_code"))  # the job's last line says it to people
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("crowdlayer").setLevel(logging.INFO)
    logging.captureWarnings(True)


def in_json() -> bool:
    """Whether the log is an object per line."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def only_errors() -> None:
    """Say nothing of less weight from now on, in a process that is one of several."""
    for name in ("", "crowdlayer"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def about(what: str, which: str) -> Iterator[None]:
    """Meanwhile each line of this thread says so: its text begins with it, its object has it under the key `what`."""
    make, thread = logging.getLogRecordFactory(), threading.get_ident()

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        if record.thread == thread:
            record.msg = f"{what} {which}: {record.msg}"
            setattr(record, what, which)
        return record

    logging.setLogRecordFactory(made)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


@contextmanager
def shown(verbose: bool) -> Iterator[logging.Logger]:
    """Show this package's log for a while: on standard error, unless the program has said where and what it logs."""
    log = logging.getLogger("crowdlayer")
    handler = logging.StreamHandler(sys.stderr)
    before = log.level
    if verbose and not log.hasHandlers():
        log.addHandler(handler)
    if verbose and before == logging.NOTSET:  # the root's, which is WARNING where nobody has set it
        log.setLevel(logging.INFO)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def track(
    items: Iterable[T], what: str, total: int, unit: str, done: int = 0, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Give `items` on, and show how far that is: a bar on a terminal, elsewhere a line a minute.

    Args:
        what: is done, in a word or two.
        total, unit: how much there is of what; a unit of B counts bytes.
        done: how much was already there.
        size: of an item, in units.
    """
    if any(isinstance(handler, TerminalHandler) for handler in logging.getLogger().handlers):
        with tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    started = said = time.monotonic()
    before = done
    for item in items:
        yield item
        done += size(item)
        if (now := time.monotonic()) - said >= LINE_EVERY and done < total:
            said = now
            rate = (done - before) / (now - started)
            left = (total - done) / rate if rate else float("inf")
            scale, shown_unit = (1e6, "MB") if unit == "B" else (1, unit)
            log.info(
                "%s: %.0f of %.0f %s, %.3g per second, %s left",
                what, done / scale, total / scale, shown_unit, rate / scale, duration(left),
                extra={"phase": what, "done": done, "total": total, "rate": round(rate, 3)},
            )  # fmt: skip


def duration(seconds: float) -> str:
    """For people: `8 s`, `5 min`, `3.2 h`, `2.1 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
