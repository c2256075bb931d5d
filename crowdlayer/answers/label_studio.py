"""Label Studio: its exports in, and tasks to look at again out, as it imports them."""

from __future__ import annotations

import csv
import logging
import mimetypes
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import msgspec

from ..errors import DataError, one_line, short
from ..settings import folder_and_name, is_archive
from ..storage.files import decode_json

Kind = TypeVar("Kind")

log = logging.getLogger(__name__)

UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")
"""What Label Studio puts before the name of a file that was uploaded to it."""
FROM_NAME, TO_NAME = "choice", "image"
"""The names of the controls in Label Studio's own template for image classification."""
OWN = frozenset(
    {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "comments", "project"}
)
"""The fields of a flat export that are Label Studio's own."""


@dataclass(frozen=True)
class Vote:
    """One answer; `image` is the path of the image, as it is in the data set."""

    image: str
    worker: str
    label: str
    when: str = ""

    @property
    def task(self) -> str:
        """The stem of the image's file name, which is how the job finds it."""
        return PurePosixPath(self.image).stem


class _Choices(msgspec.Struct):
    choices: list[str | int]


class _Result(msgspec.Struct):
    type: str | None = None
    value: Any = None


class _Annotation(msgspec.Struct):
    result: list[_Result] = []
    completed_by: Any = None
    was_cancelled: bool | None = None
    updated_at: Any = None


class _Task(msgspec.Struct):
    """What is read of a task in a JSON export."""

    data: dict[str, Any]
    annotations: list[_Annotation]
    id: Any = None


def read_export(path: Path) -> list[Vote] | None:
    """The answers in an export of Label Studio (JSON, JSON-MIN or CSV); None where the file is not one.

    One choice per annotation is what maps cleanly. Skipped and empty annotations are left out, and those of nobody, as
    they are when their user has been deleted. Of several by one person for one image the latest counts.

    Raises:
        DataError: an annotation with several choices, an image without a name, two of one name, no annotation at all.
    """
    found = _from_csv(path) if path.suffix.lower() == ".csv" else _from_json(path)
    if found is None:
        return None
    votes: dict[tuple[str, str], Vote] = {}
    images: dict[str, str] = {}
    n = of_nobody = 0
    for vote in sorted(found, key=lambda vote: vote.when):
        if (first := images.setdefault(vote.task, vote.image)) != vote.image:
            raise DataError(
                f"{path.name}: task {short(vote.task)}: must have one image, has {short(first)} and {short(vote.image)}"
            )
        if vote.worker:
            votes[vote.task, vote.worker] = vote
            n += 1
        else:
            of_nobody += 1
    if of_nobody:
        log.warning("%s: %d annotations have no annotator any more and are left out", path.name, of_nobody)
    if not votes:
        raise DataError(f"{path.name}: must have at least one annotation with a choice, has none")
    if n > len(votes):
        log.warning("%s: %d annotations were replaced by later ones of the same person", path.name, n - len(votes))
    return list(votes.values())


def _from_json(path: Path) -> Iterator[Vote] | None:
    try:
        items = decode_json(path.read_bytes(), object)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name}: must be JSON: {one_line(str(error))}") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return None
    if all("annotations" in item and "data" in item for item in items):
        tasks = _converted(path.name, items, list[_Task])
        return (vote for task in tasks for vote in _annotations(path.name, task))
    if all("annotator" in item for item in items):
        return _flat(path.name, items)
    return None


def _converted(file: str, value: Any, kind: type[Kind]) -> Kind:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{file}: must be as Label Studio exports it: {one_line(str(error))}") from error


def _from_csv(path: Path) -> Iterator[Vote] | None:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            columns = rows.fieldnames or ()
            if "annotator" not in columns:
                return None
            items = []
            for row in rows:
                if None in row:
                    raise DataError(f"{path.name}: line {rows.line_num}: must have {len(columns)} columns, has more")
                items.append(row)
            return _flat(path.name, items)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: must be CSV in UTF-8: {one_line(str(error))}") from error


def _annotations(file: str, task: _Task) -> Iterator[Vote]:
    """The votes in one task of a JSON export."""
    image = _image(file, task.data, task.id)
    for annotation in task.annotations:
        results = [result for result in annotation.result if result.type == "choices"]
        if annotation.was_cancelled or not results:
            continue
        by = annotation.completed_by
        worker = by.get("email") or by.get("id") if isinstance(by, dict) else by
        choices = [choice for result in results for choice in _converted(file, result.value, _Choices).choices]
        yield _vote(file, image, worker, choices, annotation.updated_at)


def _flat(file: str, items: Sequence[dict[str, Any]]) -> Iterator[Vote]:
    """The votes of JSON-MIN and CSV, whose items are annotations: the data's fields, the choice's, and these."""
    said = ((name, value) for item in items for name, value in item.items() if name not in OWN and _says(value))
    fields = {name for name, value in said if not _is_image(value)}
    column = FROM_NAME if FROM_NAME in fields else min(fields, default="")
    if len(fields) > 1 and column != FROM_NAME:
        has = short(str(sorted(fields)), 300)
        raise DataError(f"{file}: must have one field with the label, or one named {FROM_NAME}, has {has}")
    for item in items:
        if _says(item.get(column)):
            image = _image(file, item, item.get("id"))
            yield _vote(file, image, item["annotator"], _choices(item[column]), item.get("updated_at"))


def _says(field: Any) -> bool:
    """Whether there is a value in a field: 0 is one, where the choices are numbers."""
    return field not in (None, "", [], {})


def _choices(field: Any) -> list[Any]:
    """One choice, or several: {"choices": […]}, in CSV as text."""
    if isinstance(field, str) and field.startswith('{"choices"'):
        with suppress(msgspec.DecodeError, RecursionError):  # then it is a choice of an odd name
            field = msgspec.json.decode(field)
    choices = field.get("choices") if isinstance(field, dict) else None
    return choices if isinstance(choices, list) else [field]


def _vote(file: str, image: str, worker: Any, choices: Sequence[Any], when: Any) -> Vote:
    if len(choices) != 1 or not isinstance(choices[0], str | int):
        raise DataError(
            f"{file}: image {short(image)}, annotator {short(str(worker))}: "
            f"must have one choice, has {short(str(list(choices)), 200)}"
        )
    return Vote(image, "" if worker is None else str(worker), str(choices[0]), str(when or ""))


def _is_image(value: object) -> bool:
    kind = mimetypes.guess_type(PurePosixPath(_path(value)).name, strict=False)[0] if isinstance(value, str) else None
    return kind is not None and kind.startswith("image/")


def _path(value: str) -> str:
    """The path in a URL of an image; of Label Studio's local files it is the query's d. Empty in what is no URL.

    A browser's URL has its odd letters encoded; a bucket's key is its object's name as it is.
    """
    kind, separator, key = value.partition("://")
    if separator and kind.lower() not in ("http", "https"):
        return key
    try:
        parts = urlsplit(value)
    except ValueError:
        return ""
    path = unquote(parts.path) if separator else parts.path
    return (parse_qs(parts.query).get("d") or [path])[0]


def _image(file: str, data: dict[str, Any], number: object) -> str:
    """The path of the task's one image."""
    found = [_path(value) for value in data.values() if _is_image(value)]
    if len(found) != 1:
        raise DataError(f"{file}: task {number}: must have one image, has {len(found)}")
    image = PurePosixPath(found[0])
    if "/data/upload/" in found[0]:
        image = image.with_name(UPLOADED.sub("", image.name, count=1))
    return str(image)


def import_list(
    tasks: str, names: Sequence[str], labels: Sequence[str], scores: Sequence[float], version: str
) -> list[dict[str, Any]]:
    """Tasks that Label Studio imports, each with its label as a prediction; a low score asks for a second look.

    Args:
        tasks: the data set's location. Of a bucket the images are its objects; of a folder they are local files, which
            Label Studio serves where LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is `/`.
        names: of the images, relative to `tasks`.
    """
    if is_archive(tasks):  # as if it were unpacked where it lies
        tasks, _ = folder_and_name(tasks)
    if tasks.startswith("s3://"):
        addresses = [f"{tasks}/{name}" for name in names]
    else:
        root = quote(str(Path(tasks).resolve()).lstrip("/"))
        addresses = [f"/data/local-files/?d={root}/{quote(name)}" for name in names]
    return [
        {
            "data": {TO_NAME: address},
            "predictions": [
                {
                    "model_version": version,
                    "score": round(score, 6),
                    "result": [
                        {
                            "from_name": FROM_NAME,
                            "to_name": TO_NAME,
                            "type": "choices",
                            "value": {"choices": [label]},
                        }
                    ],
                }
            ],
        }
        for address, label, score in zip(addresses, labels, scores, strict=True)
    ]
