"""A file of answers (JSON, or CSV or Parquet in long form) → checked flat arrays, kept for the next start."""

from __future__ import annotations

import csv
import json
import logging
import zipfile
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import DataError, SettingsError, one_line, short
from ..storage.durable import whole
from ..storage.files import decode_json, disk_errors
from . import AnswerFile, Answers, canonical, natural_order

log = logging.getLogger(__name__)

COLUMNS = ("task", "worker", "label")
"""Of the long form, as crowd-kit has them; further columns are ignored."""


class _Numbers(dict[Any, int]):
    """What was met, numbered in the order of its first appearance; `map` looks up at the speed of C."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = number = len(self)
        return number


def read_answers(path: Path, kept: Path | None = None) -> AnswerFile:
    """Read {task: {worker: label}}, or rows of task, worker, label where the name ends in .csv or .parquet.

    Args:
        kept: where the arrays are kept for the next start; its name must tell the content of `path` (a digest).

    Raises:
        DataError: not such a file, no answer in it, a label of another kind, or two spellings of one id.
        SettingsError: .parquet without pyarrow.
        AccessError, StoreError: the disk does not give it.
    """
    if kept is not None and (found := _load(kept)) is not None:
        return found
    with disk_errors(str(path)):
        match path.suffix.lower():
            case ".csv":
                file = _from_rows(path.name, _csv_columns(path))
            case ".parquet":
                file = _from_rows(path.name, _parquet_columns(path))
            case _:
                file = _read_json(path)
    if kept is not None:
        _save(file, kept)
    return file


def _read_json(path: Path) -> AnswerFile:
    """One task after the other, so that no more than its own answers are ever Python objects."""
    rule = f"{path.name}: must be JSON {{task: {{worker: label}}}}"
    try:
        text = path.read_bytes()
        votes_of = decode_json(text, dict[str, msgspec.Raw])
    except FileNotFoundError as error:
        raise DataError(f"{path.name}: is missing, the data set must have {{task: {{worker: label}}}}") from error
    except ValueError as error:
        raise DataError(f"{rule}: {error}") from error
    usual = msgspec.json.Decoder(dict[str, int | str])
    unusual = msgspec.json.Decoder(dict[str, Any])
    labels = _Labels(path.name)
    workers = _Numbers()
    worker, label, count = array("i"), array("i"), array("q")
    for task, raw in votes_of.items():
        try:
            try:
                votes = usual.decode(raw)
            except msgspec.ValidationError:
                votes = labels.checked(task, unusual.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{rule}: task {short(task)}: {one_line(str(error))}") from error
        worker.extend(map(workers.__getitem__, votes))
        label.extend(map(labels.numbers.__getitem__, votes.values()))
        count.append(len(votes))
    labels.complain()
    n_tasks = len(count)
    if text.count(b":") > n_tasks + len(label):  # in a name, or in a pair that another replaced
        _each_once(path.name, text)
    task_of = np.repeat(np.arange(n_tasks), np.asarray(count, dtype=np.int64))
    return _file(path.name, list(votes_of), list(workers), labels, task_of, np.asarray(worker), np.asarray(label))


def _each_once(file: str, text: bytes) -> None:
    """Read once more, slowly, with every pair.

    Raises:
        DataError: a task is there twice, or a worker twice in a task.
    """
    try:
        tasks = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:  # in the votes that other votes replaced, which nobody has looked at
        raise DataError(f"{file}: must have every task once, and all of it JSON: {one_line(str(error))}") from error
    complaints = [f"{file}: task {short(task)} must be there once" for task in _repeated(task for task, _ in tasks)]
    if not complaints:  # else some votes may be anything
        complaints = [
            f"{file}: task {short(task)}, worker {short(worker)}: must answer once"
            for task, votes in tasks
            for worker in _repeated(worker for worker, _ in votes)
        ]
    if complaints:
        raise DataError(*complaints)


def _repeated(ids: Iterable[str]) -> list[str]:
    return [identifier for identifier, count in Counter(ids).items() if count > 1]


class _Labels:
    """The labels met, numbered, and what is wrong with those that are neither an index nor a name."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.numbers = _Numbers()
        self._wrong: dict[str, str] = {}

    def checked(self, task: str, votes: dict[str, Any]) -> dict[str, int | str]:
        """A task's votes with 1.0 as 1; what is no label is remembered, the first time that it is met."""
        for worker, label in votes.items():
            if isinstance(label, float) and label.is_integer():
                votes[worker] = int(label)
            elif isinstance(label, bool) or not isinstance(label, int | str):
                shown = short(msgspec.json.encode(label).decode())
                self._wrong.setdefault(
                    shown,
                    f"{self.file}: task {short(canonical(task))}, worker {short(worker)}: "
                    f"label {shown} must be an index or a class name",
                )
                votes[worker] = shown
        return votes

    def complain(self) -> None:
        if self._wrong:
            raise DataError(*self._wrong.values())


def _file(
    name: str,
    tasks: Sequence[str],
    workers: Sequence[str],
    labels: _Labels,
    task: npt.NDArray[Any],
    worker: npt.NDArray[Any],
    label: npt.NDArray[Any],
) -> AnswerFile:
    """The answers, tasks in the order met, workers in natural order."""
    if not len(label):
        raise DataError(f"{name}: must have at least one answer, has none")
    order = sorted(range(len(workers)), key=[(natural_order(worker), worker) for worker in workers].__getitem__)
    place = np.empty(len(workers), dtype=np.int64)
    place[order] = np.arange(len(workers))
    return AnswerFile(
        _task_ids(name, tasks),
        [workers[i] for i in order],
        list(labels.numbers),
        Answers(len(tasks), len(workers), task, place[worker], label.astype(np.int64)),
    )


def _task_ids(file: str, found: Sequence[str]) -> list[str]:
    """The canonical forms of ids that are all different; they must be different still."""
    ids = [canonical(identifier) for identifier in found]
    if ids != found and (twice := _repeated(ids)):
        raise DataError(f"{file}: every task id must occur once, {short(twice[0])!r} has several spellings")
    return ids


# --- the long form ---------------------------------------------------------------------------------------------------

Chunk = tuple[Iterable[str], Iterable[str], Iterable[int | str]]
"""Some rows' tasks, workers and labels."""


def _from_rows(name: str, chunks: Iterator[Chunk]) -> AnswerFile:
    """Answers from rows in any order; they come sorted by task, each task's in the order of the file."""
    tasks, workers, labels = _Numbers(), _Numbers(), _Labels(name)
    task, worker, label = array("i"), array("i"), array("i")
    for some_tasks, some_workers, some_labels in chunks:
        task.extend(map(tasks.__getitem__, some_tasks))
        worker.extend(map(workers.__getitem__, some_workers))
        label.extend(map(labels.numbers.__getitem__, some_labels))
    of_task = np.asarray(task, dtype=np.int64)
    pair = of_task * max(len(workers), 1) + np.asarray(worker)
    pair.sort()
    if (twice := np.flatnonzero(pair[1:] == pair[:-1])).size:
        first = pair[twice[0]]
        ids = [short(list(of)[i]) for of, i in zip((tasks, workers), divmod(int(first), len(workers)), strict=True)]
        count = np.count_nonzero(pair == first)
        raise DataError(f"{name}: task {ids[0]}, worker {ids[1]}: must have one answer, has {count}")
    order = np.argsort(of_task, kind="stable")
    return _file(
        name, list(tasks), list(workers), labels, of_task[order], np.asarray(worker)[order], np.asarray(label)[order]
    )


def _csv_columns(path: Path, rows_at_once: int = 2**16) -> Iterator[Chunk]:
    """The three columns of a CSV file with a header, some rows at a time."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.reader(lines, strict=True)
            header = next(rows, [])
            columns = [_column(path.name, header, wanted) for wanted in COLUMNS]
            chunk: list[tuple[str, str, str]] = []
            for row in rows:
                try:
                    task, worker, label = (row[column] for column in columns)
                except IndexError:
                    if not row:
                        continue  # a line of nothing
                    raise DataError(f"{path.name}: line {rows.line_num}: must have all columns of the header") from None
                if not (task and worker and label):
                    missing = COLUMNS[(task, worker, label).index("")]
                    raise DataError(f"{path.name}: line {rows.line_num}: must have a {missing}, has none")
                chunk.append((task, worker, label))
                if len(chunk) == rows_at_once:
                    yield zip(*chunk, strict=True)  # type: ignore[misc]
                    chunk.clear()
            if chunk:
                yield zip(*chunk, strict=True)  # type: ignore[misc]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: must be CSV in UTF-8: {one_line(str(error))}") from error


def _parquet_columns(path: Path) -> Iterator[Chunk]:
    """The three columns of a Parquet file, some rows at a time."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise SettingsError(f"ANSWERS: {path.name} needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            for wanted in COLUMNS:
                _column(path.name, file.schema_arrow.names, wanted)
            for batch in file.iter_batches(columns=list(COLUMNS)):
                columns = []
                for wanted in COLUMNS:
                    column = batch.column(wanted)
                    if column.null_count:
                        raise DataError(f"{path.name}: column {wanted}: must have a value in every row")
                    if pa.types.is_floating(column.type):  # what pandas makes of integers beside a missing value
                        column = column.cast(pa.int64())
                    if wanted != "label" or not pa.types.is_integer(column.type):
                        column = column.cast(pa.string())
                    columns.append(column.to_pylist())
                yield columns[0], columns[1], columns[2]
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; one of a damaged page has no number
        rule = "must be Parquet with columns of text or integers"
        raise DataError(f"{path.name}: {rule}: {one_line(str(error))}") from error


def _column(file: str, header: Sequence[str], wanted: str) -> int:
    if header.count(wanted) != 1:
        raise DataError(f"{file}: must have columns {', '.join(COLUMNS)} once, has {short(', '.join(header), 200)}")
    return header.index(wanted)


# --- kept for the next start -----------------------------------------------------------------------------------------


def _save(file: AnswerFile, kept: Path) -> None:
    """Write the arrays whole or not at all, in place of those of older answers.

    A start that finds none reads the file of answers again.
    """
    answers, names = file.answers, msgspec.json.encode([file.tasks, file.workers, file.labels])
    parts = {part: getattr(answers, part) for part in COLUMNS}
    narrow = {part: values.astype(np.min_scalar_type(int(values.max()))) for part, values in parts.items()}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        for older in kept.parent.glob("*answers-*.npz*"):
            older.unlink(missing_ok=True)
        with whole(kept) as stream:
            np.savez(stream, names=np.frombuffer(names, dtype=np.uint8), **narrow)
    except OSError as error:
        log.warning("%s: the answers cannot be kept for the next start: %s", kept, error.strerror)


def _load(kept: Path) -> AnswerFile | None:
    """What was kept; None where there is none, or where the checksums of the zip say that it is damaged."""
    try:
        with kept.open("rb") as stream, np.load(stream, allow_pickle=False) as parts:
            tasks, workers, labels = msgspec.json.decode(parts["names"].tobytes())
            task, worker, label = (parts[part].astype(np.int64) for part in COLUMNS)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, msgspec.DecodeError):
        return None
    return AnswerFile(tasks, workers, labels, Answers(len(tasks), len(workers), task, worker, label))
