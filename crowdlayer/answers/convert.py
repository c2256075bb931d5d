"""Answers from one form into another: `python -m crowdlayer.answers convert FROM TO`."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from .. import command
from ..errors import DataError, SettingsError, short
from ..settings import quoted
from ..storage.durable import whole
from ..storage.files import disk_errors
from . import AnswerFile
from .files import COLUMNS, read_answers
from .label_studio import read_export

log = logging.getLogger(__name__)

USAGE = """python -m crowdlayer.answers convert FROM TO

FROM   answers: .json {task: {worker: label}}, .csv or .parquet with the columns task, worker, label,
       or an export of Label Studio (JSON, JSON-MIN or CSV)
TO     .json, .csv or .parquet, by the ending; both are files on this machine"""


def main(arguments: Sequence[str]) -> int:
    """Convert; returns the exit code, the same as a run's."""

    def work(verb: str, source: str, target: str) -> str:
        if verb != "convert":
            raise SettingsError(f"python -m crowdlayer.answers: must be convert, got {quoted(verb)}")
        paths = command.on_this_machine("FROM", source), command.to_write("TO", target)
        return f"{target}: {convert(*paths)} answers"

    return command.run(USAGE, work, arguments)


def convert(source: Path, target: Path) -> int:
    """Write the answers in `source` to `target`, in the form of its ending; returns how many there are.

    Raises:
        DataError: `source` has no answers, or one that the form of `target` cannot hold; nothing is written then.
        SettingsError: no such form; .parquet without pyarrow.
    """
    writer = {".json": _write_json, ".csv": _write_csv, ".parquet": _write_parquet}.get(target.suffix.lower())
    if writer is None:
        raise SettingsError(f"{target.name}: must end in .json, .csv or .parquet")
    rows = list(answers_in(source))
    with disk_errors(str(target)), whole(target) as file:  # it may be the source
        writer(file, target.name, rows)
    return len(rows)


Row = tuple[str, str, int | str]
"""task, worker, label"""


def answers_in(source: Path) -> Iterator[Row]:
    """The answers in a file of any form that is read here."""
    if not source.is_file():
        raise DataError(f"{source}: must be a file of answers, there is none")
    exported = read_export(source) if source.suffix.lower() in (".json", ".csv") else None
    if exported is not None:
        return ((vote.task, vote.worker, vote.label) for vote in exported)
    return _rows(read_answers(source))


def _rows(file: AnswerFile) -> Iterator[Row]:
    answers = file.answers
    for task, worker, label in zip(answers.task, answers.worker, answers.label, strict=True):
        yield file.tasks[task], file.workers[worker], file.labels[label]


def _write_json(file: IO[bytes], target: str, rows: Sequence[Row]) -> None:
    answers: dict[str, dict[str, int | str]] = {}
    for task, worker, label in rows:
        answers.setdefault(task, {})[worker] = label
    file.write(msgspec.json.encode(answers) + b"\n")


def _write_csv(file: IO[bytes], target: str, rows: Sequence[Row]) -> None:
    if empty := [row for row in rows if "" in row]:  # no reader takes it
        raise DataError(*(f"{_place(target, row)}: must have a {COLUMNS[row.index('')]}, has none" for row in empty))
    if any(isinstance(label, int) for _, _, label in rows):
        _say_that_indices_become_text(target)
    bare = any("\r" in str(field) for row in rows for field in row)  # the writer leaves it so, no reader takes it
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL)
    table.writerow(COLUMNS)
    table.writerows(rows)
    text.detach()  # flushed, and left open


def _write_parquet(file: IO[bytes], target: str, rows: Sequence[Row]) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise SettingsError(f"{target}: .parquet needs pyarrow: pip install pyarrow") from error
    columns = [list(column) for column in zip(*rows, strict=True)]
    n_indices = sum(isinstance(label, int) for label in columns[2])
    if n_indices < len(rows):  # a column has one type
        columns[2] = [str(label) for label in columns[2]]
        if n_indices:
            _say_that_indices_become_text(target)
    elif large := [row for row in rows if not -(2**63) <= int(row[2]) < 2**63]:
        rule = "must be an integer of 64 bits"
        raise DataError(*(f"{_place(target, row)}: label {short(str(row[2]))} {rule}" for row in large))
    parquet.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), file)


def _place(target: str, row: Row) -> str:
    task, worker, _ = row
    return f"{target}: task {short(task)!r}, worker {short(worker)!r}"


def _say_that_indices_become_text(target: str) -> None:
    """Only who knows the classes can tell whether it matters."""
    log.warning(
        "%s: labels that are indices become text; where the names of the classes are digits they may be read as names: "
        ".json keeps them indices",
        target,
    )
