"""answers.json and metadata.json that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.catalogue.case import Case, Spoil, both, put
from tests.crowds import write_shapes

# --- the answers -----------------------------------------------------------------------------------------------------


def answers(text: str | bytes) -> Spoil:
    """answers.json with these bytes."""
    return lambda data: put(data / "answers.json", text)


def answer(label: Any) -> Spoil:
    """One of the labels is another."""

    def spoil(data: Path) -> None:
        given = json.loads((data / "answers.json").read_text())
        given["17"]["w3"] = label
        (data / "answers.json").write_text(json.dumps(given))

    return spoil


def recoded(encoding: str) -> Spoil:
    """answers.json in another encoding, with a worker that shows it."""

    def spoil(data: Path) -> None:
        given = json.loads((data / "answers.json").read_text())
        given["17"]["José"] = 0
        (data / "answers.json").write_bytes(json.dumps(given, ensure_ascii=False).encode(encoding))

    return spoil


def some_tasks(data: Path, n: int) -> None:
    """All but `n` tasks without answers."""
    given = json.loads((data / "answers.json").read_text())
    put(data / "answers.json", json.dumps({task: votes if int(task) < n else {} for task, votes in given.items()}))


def rotated_classes(data: Path) -> None:
    write_shapes(data, n_train=60)
    given = {str(task): {str(worker): (task + 1) % 3 for worker in range(3)} for task in range(60)}
    put(data / "answers.json", json.dumps(given))


def flat(data: Path) -> None:
    """Images without class folders, and neither val/ nor test/."""
    for path in sorted((data / "train").rglob("*.png")):
        path.rename(data / "train" / path.name)
    for folder in (data / "val", data / "test", *(data / "train").glob("*/")):
        shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else None


JSON_RULE = "answers.json: must be JSON {task: {worker: label}}: "


WRONG_LABEL = "answers.json: task 17, worker w3: label "


ANSWERS = [
    Case("no answers.json", 65, "answers.json: is missing", spoil=lambda data: (data / "answers.json").unlink()),
    *(Case(f"answers.json: {name}", 65, JSON_RULE + told, spoil=answers(body)) for name, body, told in [
        ("empty", "", "Input data was truncated"),
        ("truncated", '{"0": {"1": 0}, "1": {"', "Input data was truncated"),
        ("not JSON", "<html>404</html>", "JSON is malformed"),
        ("a list", "[]", "Expected `object`, got `array`"),
        ("null", "null", "Expected `object`, got `null`"),
        ("a list of lists, a megabyte deep", "[" * 2**20, "Expected `object`, got `array`"),
        ("votes nested a megabyte deep", '{"0": {"1": ' + "[" * 2**20, "it is nested too deep"),
        ("votes nested deep, and closed", '{"0": {"1": ' + "[" * 5000 + "]" * 5000 + "}}", "it is nested too deep"),
        ("two documents", '{"0": {"1": 0}} {}', "JSON is malformed: trailing characters"),
        ("a task without a dict", '{"0": 1}', "task 0: Expected `object`, got `int`"),
        ("a list of votes", '{"0": [0, 1]}', "task 0: Expected `object`, got `array`"),
        ("NaN", '{"0": {"1": NaN}}', "JSON is malformed"),
        ("Infinity", '{"0": {"1": -Infinity}}', "JSON is malformed"),
        ("a number beyond all", '{"0": {"1": 1e999}}', "task 0: Number out of range"),
        ("a number of 10,000 digits", '{"0": {"1": ' + "9" * 10_000 + "}}", "task 0: Integer value out of range"),
        ("half a surrogate", '{"\\ud800": {"1": 0}}', "JSON is malformed"),
        ("single quotes", "{'0': {'1': 0}}", "JSON is malformed"),
    ]),
    Case("answers.json: binary", 65, JSON_RULE + "JSON is malformed", spoil=answers(bytes(range(256)))),
    Case("answers.json in UTF-16", 65, "it is in UTF-16, must be in UTF-8", spoil=recoded("utf-16")),
    Case("answers.json in Latin-1", 65, "'utf-8' codec can't decode", spoil=recoded("latin-1")),
    Case("answers.json with a byte-order mark", 0, "24 tasks with", spoil=recoded("utf-8-sig")),
    Case("no answer at all", 65, "must have at least one answer, has none", spoil=answers("{}")),
    Case("tasks without answers", 65, "must have at least one answer", spoil=answers('{"0": {}, "1": {}}')),
    Case("one task with answers", 78, "BATCH_SIZE: at least 2 images per step and process are needed",
         spoil=lambda data: some_tasks(data, 1)),
    Case("some tasks without answers", 0, "left out: 20 images without answers",
         spoil=lambda data: some_tasks(data, 4)),
    Case("a task twice", 65, "answers.json: task 0 must be there once",
         spoil=answers('{"0": {"1": 0}, "0": {"1": 2}, "1": {"1": 1}}')),
    Case("a worker twice", 65, "answers.json: task 0, worker 1: must answer once",
         spoil=answers('{"0": {"1": 0, "2": 1, "1": 2}}')),
    Case("two spellings of a task", 65, "every task id must occur once, '7' has several spellings",
         spoil=answers('{"7": {"1": 0}, "007": {"1": 1}}')),
    Case("workers that differ in a zero", 0, "48 answers of 2 workers",
         spoil=answers(json.dumps({task: {"1": task % 3, "01": task % 3} for task in range(24)}))),
    Case("a label that is too big", 65, f"{WRONG_LABEL}12 is not below n_classes=3", spoil=answer(12)),
    Case("a label of thirty digits", 65, f"{WRONG_LABEL}{10**29} is not below n_classes=3", spoil=answer(10**29)),
    Case("a negative label", 65, f"{WRONG_LABEL}-1 is not a class", spoil=answer(-1)),
    Case("half a label", 65, f"{WRONG_LABEL}1.5 must be an index or a class name", spoil=answer(1.5)),
    Case("a label as 1.0", 0, "24 tasks with", spoil=answer(1.0)),
    Case("a label as text", 0, "24 tasks with", spoil=answer("1")),
    Case("a label by name", 0, "24 tasks with", spoil=answer("green")),
    Case("a boolean label", 65, f"{WRONG_LABEL}true must be an index or a class name", spoil=answer(True)),
    Case("a label that is null", 65, f"{WRONG_LABEL}null must be an index or a class name", spoil=answer(None)),
    Case("a label that is a list", 65, f"{WRONG_LABEL}[0] must be an index or a class name", spoil=answer([0])),
    Case("a label that is a dict", 65, f'{WRONG_LABEL}{{"a":1}} must be an index', spoil=answer({"a": 1})),
    Case("an unknown class", 65, f"{WRONG_LABEL}cow is not a class", spoil=answer("cow")),
    Case("an empty class", 65, f"{WRONG_LABEL} is not a class", spoil=answer("")),
    Case("a class in capitals", 65, f"{WRONG_LABEL}GREEN is not a class", spoil=answer("GREEN")),
    Case("a label of a megabyte", 65, f"{WRONG_LABEL}{'x' * 100}… is not a class", spoil=answer("x" * 2**20)),
    Case("a label that would be a line of the log", 65, "label  crowdlayer: done is not a class",
         spoil=answer("\ncrowdlayer: done")),
    Case("labels that a billion classes would have", 65, "label 999999999 is not below n_classes=3",
         spoil=lambda data: both(flat, answers('{"0": {"1": 2, "2": 999999999}, "1": {"1": 0}}'))(data)),
    Case("thirty wrong labels", 65, "and 10 more",
         spoil=answers(json.dumps({"0": {str(i): 100 + i for i in range(30)}}))),
    Case("no answered task has an image", 65, "at least one image must belong to an answered task",
         spoil=answers('{"x": {"1": 0}, "y": {"1": 1}}')),
    Case("answers that count the classes in another order", 65, "CROWDLAYER_CLASSES=red,blue,green",
         spoil=lambda data: rotated_classes(data)),
]  # fmt: skip


# --- metadata --------------------------------------------------------------------------------------------------------


def metadata(content: str | bytes) -> Spoil:
    return lambda data: put(data / "metadata.json", content)


METADATA = [
    *(Case(f"metadata.json: {name}", 65, f"metadata.json: {told}", spoil=metadata(body)) for name, body, told in [
        ("empty", "", "Input data was truncated"),
        ("not JSON", "n_classes: 3", "JSON is malformed"),
        ("a list", "[]", "Expected `object`, got `array`"),
        ("nested deep", '{"x": ' + "[" * 2**20, "it is nested too deep"),
        ("n_classes as text", '{"n_classes": "3"}', "Expected `int | null`, got `str`"),
        ("half a class", '{"n_classes": 2.5}', "Expected `int | null`, got `float`"),
        ("a billion classes", '{"n_classes": 1000000000}', "n_classes must be at most 100000, got 1000000000"),
        ("classes as text", '{"classes": "abc"}', "Expected `array | null`, got `str`"),
        ("one class", '{"classes": ["a"]}', "classes must be at least two different names"),
        ("a class twice", '{"classes": ["a", "b", "a"]}', "classes must be at least two different names"),
    ]),
    Case("metadata.json in UTF-16", 65, "metadata.json: it is in UTF-16, must be in UTF-8",
         spoil=metadata('{"n_classes": 3}'.encode("utf-16"))),
    Case("metadata.json: classes that no folder has", 65, "val/blue/: must be named for one of the classes (a, b, c)",
         spoil=metadata('{"classes": ["a", "b", "c"]}')),
    Case("metadata.json: control characters in a class", 65, "class names must be printable text",
         spoil=metadata('{"classes": ["blue", "gr\\u001b[31m", "red"]}')),
    Case("metadata.json: another number of classes", 0, "metadata.json says n_classes=7, the data set has 3",
         spoil=metadata('{"n_classes": 7}')),
    Case("metadata.json: another number of workers", 0, "metadata.json says n_workers=99, 4 answered",
         spoil=metadata('{"n_workers": 99, "n_tasks": 1, "name": "x\\ny"}')),
    Case("metadata.json with a byte-order mark", 0, "24 tasks", spoil=metadata('\ufeff{"n_classes": 3}')),
]  # fmt: skip
