"""Bad input of every kind, each with the exit code and the words that it must have.

A case is a small good data set, spoiled, and settings. `{data}` in a setting is the folder of the data set, `{tmp}` the
folder above it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.crowds import write_shapes

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


# --- settings --------------------------------------------------------------------------------------------------------


def wrong(name: str, value: str, told: str) -> Case:
    """A setting whose value is refused, and shown."""
    return Case(f"{name}={value[:20]}", 78, f"CROWDLAYER_{name}: {told}", {name: value}, shown=f", got '{value[:100]}")


NUMBER, INTEGER = "should be a valid number", "should be a valid integer"
PLACE, FORM = "must be a path or an s3:// URI", "must have the form s3://bucket"

SETTINGS = [
    Case("TASKS not set", 78, "CROWDLAYER_TASKS: must be set", {"TASKS": ""}),
    wrong("TASKS", "https://bucket/data", PLACE),
    wrong("TASKS", "s3:/bucket/data", PLACE),
    wrong("TASKS", "s3://", FORM),
    Case("TASKS with a signature", 78, "got 's3://bucket/data?***'", {"TASKS": "s3://bucket/data?X-Amz-Signature=5ecre7"}),
    Case("TASKS with credentials", 78, "got 's3://***@bucket/data'", {"TASKS": "s3://AKIA:5ecre7@bucket/data"}),
    Case("TASKS with a line break", 78, f"CROWDLAYER_TASKS: {PLACE}", {"TASKS": "/data\ncrowdlayer: done"}),
    Case("TASKS that is nowhere", 78, "TASKS: must be a folder, an s3:// URI or an archive", {"TASKS": "{tmp}/none"}),
    Case("TASKS that is a file", 78, "TASKS: must be a folder", {"TASKS": "{data}/answers.json"}),
    Case("TASKS that is no archive's", 78, "TASKS: must be a folder", {"TASKS": "{tmp}/none.tar"}),
    Case("TASKS that is a folder named as an archive", 78, "TASKS: must be", {"TASKS": "{tmp}/d.tar"},
         lambda data: shutil.copytree(data, data.parent / "d.tar")),
    wrong("ANSWERS", "ftp://answers.json", PLACE),
    Case("ANSWERS that are nowhere", 78, "ANSWERS: must be a file, there is none", {"ANSWERS": "{tmp}/none.json"}),
    Case("ANSWERS that are a folder", 78, "ANSWERS: must be a file, there is none", {"ANSWERS": "{data}"}),
    wrong("N_CLASSES", "1", "should be greater than or equal to 2"),
    wrong("N_CLASSES", "two", INTEGER),
    wrong("N_CLASSES", "3.5", INTEGER),
    wrong("N_CLASSES", "1000000000", "should be less than or equal to 100000"),
    Case("N_CLASSES that the folders contradict", 78, "N_CLASSES: must agree with the data set's 3 classes",
         {"N_CLASSES": "4"}),
    wrong("CLASSES", "cat", "must be at least two different names"),
    wrong("CLASSES", "cat,cat", "must be at least two different names"),
    wrong("CLASSES", "cat,,dog", "must be at least two different names"),
    Case("CLASSES that are half a list", 78, "CROWDLAYER_CLASSES: ", {"CLASSES": '["cat", "dog"'}),
    Case("CLASSES in lists in lists", 78, "CROWDLAYER_CLASSES: ", {"CLASSES": "[" * 100_000}),
    Case("CLASSES as many as N_CLASSES is not", 78, "CROWDLAYER_CLASSES: must be as many as n_classes=2",
         {"CLASSES": "blue,green,red", "N_CLASSES": "2"}),
    Case("CLASSES that are not the folders'", 65, "val/blue/: must be named for one of the classes",
         {"CLASSES": "cat,dog,cow"}),
    wrong("VAL_FRACTION", "0", "should be greater than 0"),
    wrong("VAL_FRACTION", "1", "should be less than 1"),
    Case("VAL_FRACTION=nan", 78, "CROWDLAYER_VAL_FRACTION: ", {"VAL_FRACTION": "nan"}),
    wrong("PATH_REMOVE", "gs://bucket/x", PLACE),
    Case("PATH_REMOVE that is nowhere", 78, "PATH_REMOVE: must be a file", {"PATH_REMOVE": "{tmp}/none.txt"}),
    Case("PATH_REMOVE of words", 65, "PATH_REMOVE answers.json: must hold two integers per line",
         {"PATH_REMOVE": "{data}/answers.json"}),
    wrong("MAX_BAD_IMAGES", "-1", "should be greater than or equal to 0"),
    wrong("MAX_BAD_IMAGES", "few", NUMBER),
    wrong("MAX_BAD_IMAGES", "2.5", "must be a share below 1 or a whole number of images"),
    wrong("MODEL", "resnet19", "is not a classification model of torchvision.models, did you mean resnet18?"),
    wrong("MODEL", "../resnet18", "is not a classification model of torchvision.models, did you mean resnet18?"),
    Case("MODEL that cannot take such images", 78, "IMG_SIZE", {"MODEL": "inception_v3", "IMG_SIZE": "16"}),
    Case("PRETRAINED from the web", 78, "CROWDLAYER_PRETRAINED: ", {"PRETRAINED": "https://host/resnet18.pth"}),
    Case("PRETRAINED that is nowhere", 78, "PRETRAINED: must be a file", {"PRETRAINED": "{tmp}/none.pth"}),
    Case("PRETRAINED that is no state dict", 78, "PRETRAINED", {"PRETRAINED": "{data}/answers.json"}),
    *(wrong(name, "maybe", "should be a valid boolean, unable to interpret input") for name in
      ("FREEZE", "DATA_AUGMENTATION", "VERBOSE")),
    *(Case(f"{name}=other", 78, f"CROWDLAYER_{name}: should be ", {name: "other"}) for name in (
        "SMALL_IMAGES", "CROWD_LAYER", "REGULARIZER", "LOSS_REDUCTION", "SELECT_BY", "OPTIMIZER", "SCHEDULER",
        "MIXED_PRECISION", "LOG_FORMAT")),
    Case("SELECT_BY accuracy without val/", 78, "SELECT_BY: accuracy needs true labels", {"SELECT_BY": "accuracy"},
         lambda data: shutil.rmtree(data / "val")),
    Case("MIXED_PRECISION of a GPU without one", 78, "MIXED_PRECISION: fp16 needs a GPU", {"MIXED_PRECISION": "fp16"}),
    wrong("SCALE", "-1", "should be greater than or equal to 0"),
    wrong("SCALE", "inf", "should be a finite number"),
    wrong("N_EPOCHS", "0", "should be greater than or equal to 1"),
    wrong("N_EPOCHS", "1e3", INTEGER),
    wrong("BATCH_SIZE", "0", "should be greater than or equal to 1"),
    wrong("LR", "0", "should be greater than 0"),
    Case("LR=nan", 78, "CROWDLAYER_LR: ", {"LR": "nan"}),
    wrong("LR", "0,1", NUMBER),
    Case("LR that blows up", 78, "lower LR=", {"LR": "1e30", "N_EPOCHS": "3"}),
    wrong("MOMENTUM", "1", "should be less than 1"),
    wrong("DECAY", "-0.1", "should be greater than or equal to 0"),
    wrong("LR_DECAY", "2", "should be less than or equal to 1"),
    Case("MILESTONES of words", 78, "CROWDLAYER_MILESTONES: ", {"MILESTONES": "soon"}),
    Case("MILESTONES before the first epoch", 78, "CROWDLAYER_MILESTONES: ", {"MILESTONES": "0,5"}),
    wrong("IMG_SIZE", "7", "should be greater than or equal to 8"),
    wrong("IMG_SIZE", "100000", "should be less than or equal to 4096"),
    wrong("SEED", "-1", "should be greater than or equal to 0"),
    wrong("SEED", "4294967296", "should be less than 4294967296"),
    Case("NUM_WORKERS=-1", 78, "CROWDLAYER_NUM_WORKERS: ", {"NUM_WORKERS": "-1"}),
    wrong("OUTPUT", "file:///tmp/out", PLACE),
    wrong("OUTPUT_NAME", "../out", "must be a file name"),
    wrong("OUTPUT_NAME", ".hidden", "must be a file name"),
    wrong("OUTPUT_NAME", "n" * 201, "must be a file name"),
    wrong("WORKDIR", "s3://bucket/work", "must be a folder on this machine"),
    Case("a setting that is not one", 78, "CROWDLAYER_LEARNING_RATE: is not a setting", {"LEARNING_RATE": "1"}),
    Case("a setting misspelt", 78, "CROWDLAYER_EPOCHS: is not a setting, did you mean CROWDLAYER_N_EPOCHS?",
         {"EPOCHS": "5"}),
    Case("a setting in small letters", 78, "crowdlayer_lr: is not a setting", environment={"crowdlayer_lr": "1"}),
    Case("an unknown argument", 78, "arguments: must be", arguments=("--chek",)),
    Case("a value that is no UTF-8", 78, "CROWDLAYER_OUTPUT_NAME: must be a file name", {"OUTPUT_NAME": "a\udcff"}),
    Case("a value of a megabyte", 78, "CROWDLAYER_MODEL: is not a classification model", {"MODEL": "m" * 100_000}),
    Case("thirty settings that are not one", 78, "and 10 more", {f"NO_SUCH_{i}": "1" for i in range(30)}),
]  # fmt: skip


# --- the answers -----------------------------------------------------------------------------------------------------


def answers(text: str | bytes) -> Spoil:
    """answers.json with these bytes."""
    return lambda data: _write(data / "answers.json", text)


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


def _write(path: Path, body: str | bytes) -> None:
    path.write_bytes(body.encode() if isinstance(body, str) else body)


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


def some_tasks(data: Path, n: int) -> None:
    """All but `n` tasks without answers."""
    given = json.loads((data / "answers.json").read_text())
    _write(data / "answers.json", json.dumps({task: votes if int(task) < n else {} for task, votes in given.items()}))


def rotated_classes(data: Path) -> None:
    write_shapes(data, n_train=60)
    given = {str(task): {str(worker): (task + 1) % 3 for worker in range(3)} for task in range(60)}
    _write(data / "answers.json", json.dumps(given))


def flat(data: Path) -> None:
    """Images without class folders, and neither val/ nor test/."""
    for path in sorted((data / "train").rglob("*.png")):
        path.rename(data / "train" / path.name)
    for folder in (data / "val", data / "test", *(data / "train").glob("*/")):
        shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else None


# --- metadata --------------------------------------------------------------------------------------------------------


def metadata(content: str | bytes) -> Spoil:
    return lambda data: _write(data / "metadata.json", content)


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


# --- images ----------------------------------------------------------------------------------------------------------


def image(body: bytes, name: str = "square-2.png") -> Spoil:
    """An image of train/red with these bytes."""

    def spoil(data: Path) -> None:
        (data / "train/red/square-2.png").unlink()
        (data / "train/red" / name).write_bytes(body)

    return spoil


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def red(mode: str = "RGB", size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (230, 40, 40)).convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(red(), "JPEG", exif=exif)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of kilobytes that says it has so many pixels, and has them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


WHOLE = saved(red(size=64), "PNG")
NOT_AN_IMAGE = "train/red/square-2.png: must be an image: "
TOO_MANY = "1 of 42 images are broken, more than MAX_BAD_IMAGES=0.01 allows: "

IMAGES = [
    *(Case(f"an image: {name}", 65, TOO_MANY + NOT_AN_IMAGE + told, spoil=image(body)) for name, body, told in [
        ("zero bytes", b"", "it is of no known format"),
        ("a page named as one", b"<!DOCTYPE html><html>404</html>", "it is of no known format"),
        ("random bytes", np.random.default_rng(0).bytes(5000), "it is of no known format"),
        ("cut in half", WHOLE[: len(WHOLE) // 2], ""),
        ("cut in its header", WHOLE[:20], ""),
        ("flipped bits", WHOLE[:60] + bytes(b ^ 255 for b in WHOLE[60:100]) + WHOLE[100:], ""),
        ("a cut jpeg", saved(red(size=64), "JPEG")[:500], ""),
        ("30,000 × 30,000 pixels", png_bomb(30_000, 30_000), "Image size (900000000 pixels) exceeds limit"),
        ("PostScript", saved(red(), "EPS"), "it is of no known format"),
        ("an ICO", saved(red(), "ICO"), "it is of no known format"),
        ("a zip", b"PK\x03\x04" + bytes(500), "it is of no known format"),
        ("0 × 0 pixels", b"P6\n0 0\n255\n", ""),
        ("numbers without an end", b"P6\n" + b"9" * 100_000 + b" 1\n255\n", ""),
    ]),
    *(Case(f"an image: {name}", 0, "best epoch 1 of 1", spoil=image(body, file)) for name, body, file in [
        ("1 × 1", saved(red(size=1), "PNG"), "square-2.png"),
        ("1 × 5,000", saved(red().resize((1, 5000)), "PNG"), "square-2.png"),
        ("animated", saved(red(), "GIF", save_all=True, append_images=[red().rotate(90)]), "square-2.png"),
        ("animated webp", saved(red(), "WEBP", save_all=True, append_images=[red("L")]), "square-2.webp"),
        ("CMYK", saved(red("CMYK"), "JPEG"), "square-2.jpg"),
        ("16 bit", saved(Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "PNG"), "square-2.png"),
        ("16-bit TIFF", saved(Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "TIFF"), "square-2.tif"),
        ("floats", saved(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"), "square-2.tiff"),
        ("NaN pixels", saved(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"), "square-2.tiff"),
        ("grey with alpha", saved(red("LA"), "PNG"), "square-2.png"),
        ("one bit", saved(red("1"), "PNG"), "square-2.png"),
        ("a palette with transparency", saved(red("P"), "PNG", transparency=b"\x00\x80"), "square-2.png"),
        ("rotated by EXIF", rotated(), "square-2.jpg"),
        ("a jpeg named .png", saved(red(), "JPEG"), "square-2.png"),
        ("a png named .jpg", WHOLE, "square-2.jpg"),
        ("in capitals", WHOLE, "SQUARE-2.PNG"),
        ("12,000 × 12,000 pixels", png_bomb(12_000, 12_000), "square-2.png"),
    ]),
    Case("a broken image within the limit", 0, f"left out: 1 broken images: {NOT_AN_IMAGE}", {"MAX_BAD_IMAGES": "1"},
         image(b"")),
    Case("a broken image within 5 %", 0, "left out: 1 broken images", {"MAX_BAD_IMAGES": "5 %"}, image(b"")),
    Case("two broken images where one may be", 65, "2 of 42 images are broken, more than MAX_BAD_IMAGES=1 allows",
         {"MAX_BAD_IMAGES": "1"}, both(image(b""), lambda data: (data / "val/red/square-2.png").write_bytes(b""))),
    Case("a broken image where none may be", 65, "more than MAX_BAD_IMAGES=0 allows", {"MAX_BAD_IMAGES": "0"},
         image(b"")),
    Case("every image of val/ is broken", 65, "val/: at least one image must be whole, none is",
         {"MAX_BAD_IMAGES": "20"}, lambda data: [p.write_bytes(b"") for p in data.glob("val/*/*")]),
    Case("many broken images", 65, "and 4 more",
         spoil=lambda data: [p.write_bytes(b"") for p in data.glob("train/*/*")]),
]  # fmt: skip


# --- folders and names -----------------------------------------------------------------------------------------------


def add(name: str, body: bytes = WHOLE) -> Spoil:
    """A further file."""

    def spoil(data: Path) -> None:
        path = Path(f"{data}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)

    return spoil


def link(name: str, target: str) -> Spoil:
    def spoil(data: Path) -> None:
        (data / name).symlink_to(target)

    return spoil


E_COMPOSED, E_DECOMPOSED = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
FORTY_TWO = "24 tasks with"

NAMES = [
    Case("an empty folder", 65, "must hold train/ and answers.json", {"TASKS": "{tmp}/empty"},
         lambda data: (data.parent / "empty").mkdir()),
    Case("no train/", 65, "train/: at least one image must belong", spoil=lambda data: shutil.rmtree(data / "train")),
    Case("an empty class folder", 0, FORTY_TWO, spoil=lambda data: (data / "val/yellow").mkdir()),
    Case("val/ without class folders", 65, "val/: must be named for one of the classes", spoil=add("val/x.png")),
    Case("a class of val/ that is none", 65, "val/pink/: must be named for one of the classes",
         {"CLASSES": "blue,green,red"}, add("val/pink/x.png")),
    Case("hidden files", 0, FORTY_TWO, spoil=both(add("train/red/.x-1.png", b""), add("train/.git/x-1.png", b""))),
    Case("Thumbs.db and .DS_Store", 0, FORTY_TWO, spoil=both(add("train/Thumbs.db", b"x"), add("val/.DS_Store", b"x"))),
    Case("__MACOSX", 0, FORTY_TWO,
         spoil=both(add("__MACOSX/train/._x-1.png", b""), add("train/__MACOSX/._x-1.png", b""))),
    Case("a link out of the tree", 0, FORTY_TWO, spoil=both(
        add("../elsewhere/x-99.png"), link("train/red/x-99.png", "../../../elsewhere/x-99.png"))),
    Case("a link to nowhere", 0, FORTY_TWO, spoil=link("train/red/x-99.png", "/nowhere/x-99.png")),
    Case("a link to itself", 0, FORTY_TWO, spoil=link("train/red/x-99.png", "x-99.png")),
    Case("links in a loop", 0, FORTY_TWO, spoil=both(link("train/loop", ".."), link("train/red/up", "../.."))),
    Case("a pipe named as an image", 0, FORTY_TWO, spoil=lambda data: os.mkfifo(data / "train/red/x-99.png")),
    Case("a folder named as an image", 0, FORTY_TWO, spoil=lambda data: (data / "train/red/x-99.png").mkdir()),
    Case("two images of one task", 65, "task 2 must have one image, has train/red/square-2.png too",
         spoil=add("train/red/zzz-2.png")),
    Case("two images of one task by value", 65, "task 2 must have one image", spoil=add("train/red/zzz-002.png")),
    Case("names that differ in capitals only", 65, "task 2 must have one image", spoil=add("train/red/SQUARE-2.PNG")),
    Case("names that differ in Unicode form only", 0, "left out: 2 images without answers",
         spoil=both(add(f"train/{E_COMPOSED}.png"), add(f"train/{E_DECOMPOSED}.png"))),
    Case("classes that differ in Unicode form only", 0, "4 classes",
         spoil=both(add(f"val/{E_COMPOSED}/x.png"), add(f"val/{E_DECOMPOSED}/x.png"))),
    Case("classes that differ in capitals only", 0, "some class names differ in capitals only",
         {"CLASSES": "blue,green,red,Red"}, add("val/Red/x.png")),
    Case("spaces, quotes, percents", 0, FORTY_TWO, spoil=both(
        add("train/red/a b  c -99.png"), add("train/red/%2e%2e'\"&?#-98.png"))),
    Case("a name with a line break", 0, "left out: 1 images without answers",
         spoil=add("train/red/x\ncrowdlayer: -99.png")),
    Case("a name that is no UTF-8", 0, "left out: 1 images without answers",
         spoil=add("train/red/\udcff\udcfe-99.png")),
    Case("answered and broken images whose names are no UTF-8", 0, "left out: 1 broken images", {"MAX_BAD_IMAGES": "1"},
         both(image(WHOLE, "caf\udce9-2.png"), add("test/red/\udce9.png", b""))),
    Case("a class that is no UTF-8", 65, "class names must be printable text", spoil=add("val/\udcff/x.png")),
    Case("a class with a line break", 65, "class names must be printable text", spoil=add("val/re\nd/x.png")),
    Case("a broken image with a line break in its name", 65, "must be an image",
         spoil=image(b"", "square\ncrowdlayer: all is well-2.png")),
    Case("folders 50 deep", 0, FORTY_TWO, spoil=add("train/red/" + "d/" * 50 + "x-99.png")),
]  # fmt: skip


# --- archives --------------------------------------------------------------------------------------------------------


def archived(kind: str, spoil_body: Callable[[bytes], bytes] = lambda body: body, prefix: str = "") -> Spoil:
    """The data set as data.<kind>, beside its folder."""

    def spoil(data: Path) -> None:
        names = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
        path = data.parent / f"data.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.write(data / name, f"{prefix}{name}")
        else:
            with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
                for name in names:
                    tar.add(data / name, f"{prefix}{name}")
        path.write_bytes(spoil_body(path.read_bytes()))

    return spoil


def tar_with(*members: tuple[tarfile.TarInfo, bytes], packed: bool = False) -> Spoil:
    """The data set as data.tar, or data.tar.gz, with further members."""

    def spoil(data: Path) -> None:
        with tarfile.open(data.parent / ("data.tar.gz" if packed else "data.tar"), "w:gz" if packed else "w") as tar:
            tar.add(data, "")
            for info, body in members:
                tar.addfile(info, io.BytesIO(body))

    return spoil


def member(
    name: str, body: bytes = WHOLE, kind: bytes = tarfile.REGTYPE, to: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(body) if kind == tarfile.REGTYPE else 0, kind, to
    return info, body


def zip_with(name: str, body: bytes = WHOLE, mode: int = 0) -> Spoil:
    def spoil(data: Path) -> None:
        archived("zip")(data)
        with zipfile.ZipFile(data.parent / "data.zip", "a") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, body)

    return spoil


def zip_bomb(data: Path) -> None:
    """Two gigabytes in two megabytes."""
    with zipfile.ZipFile(data.parent / "data.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i in range(16):
            archive.writestr(f"train/{i}.png", bytes(2**27))


def tar_of_zeros(data: Path, info: tarfile.TarInfo) -> None:
    """A tar.gz with a header, and what it declares, of zeros; gzip's parts may be the same many times."""
    zeros = gzip.compress(bytes(2**24))
    (data.parent / "data.tar.gz").write_bytes(gzip.compress(info.tobuf()) + zeros * (info.size // 2**24))


def tar_bomb(data: Path) -> None:
    """Two gigabytes in two megabytes."""
    info = tarfile.TarInfo("train/x-0.png")
    info.size = 2**31
    tar_of_zeros(data, info)


def header_bomb(data: Path) -> None:
    """A long name of half a gigabyte, which tarfile would read at once."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**29
    tar_of_zeros(data, info)


def sparse_bomb(data: Path) -> None:
    """A file of eight terabytes that has no bytes at all."""
    info = tarfile.TarInfo("train/x-0.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": info.name,
                        "GNU.sparse.realsize": str(2**43)}  # fmt: skip
    info.size = 512
    with tarfile.open(data.parent / "data.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))


def negative_tar(data: Path) -> None:
    """A member of a negative size, with which some Pythons go round in circles (CVE-2025-8194)."""
    good, bad = tarfile.TarInfo("train/x-0.png"), tarfile.TarInfo("train/x-1.png")
    body = bytearray(bad.tobuf(tarfile.GNU_FORMAT))
    body[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    body[148:156] = b"        "
    body[148:156] = b"%06o\0 " % sum(body[:512])
    (data.parent / "data.tar").write_bytes(good.tobuf() + bytes(body) + bytes(10240))


TAR, GZ, ZIP = ({"TASKS": f"{{tmp}}/data.{kind}"} for kind in ("tar", "tar.gz", "zip"))

ARCHIVES = [
    *(Case(f"a good {kind}, with a folder around it", 0, FORTY_TWO, at, archived(kind, prefix="shapes/"))
      for kind, at in [("tar", TAR), ("tar.gz", GZ), ("zip", ZIP)]),
    *(Case(f"a {kind} cut in half", 65, "must be a whole archive", at, archived(kind, lambda b: b[: len(b) // 2]))
      for kind, at in [("tar", TAR), ("tar.gz", GZ), ("zip", ZIP)]),
    *(Case(f"an empty {kind}", 65, "must be a whole archive", at, archived(kind, lambda b: b""))
      for kind, at in [("tar", TAR), ("tar.gz", GZ), ("zip", ZIP)]),
    Case("a page named .zip", 65, "must be a whole archive", ZIP, archived("zip", lambda b: b"<html>")),
    Case("a tar named .zip", 65, "must be a whole archive", ZIP,
         both(archived("tar"), lambda data: (data.parent / "data.tar").rename(data.parent / "data.zip"))),
    *(Case(f"a tar with {name}", 65, f"{name!r}: a name must", TAR, tar_with(member(name)))
      for name in ("../x-1.png", "/etc/x-1.png", "train/../../x-1.png", "C:x-1.png", "train\\..\\x-1.png")),
    Case("a zip with ../", 65, "'../x-1.png': a name must have no empty part", ZIP, zip_with("../x-1.png")),
    Case("a zip with an absolute name", 65, "'/x-1.png': a name must be relative", ZIP, zip_with("/x-1.png")),
    Case("a name with a line break in a zip", 65, "a name must have no control character", ZIP,
         zip_with("train/a\nb.png")),
    Case("a symbolic link in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/red/x-99.png", b"", tarfile.SYMTYPE, "/etc/passwd"))),
    Case("a file through a symbolic link in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/out", b"", tarfile.SYMTYPE, "../.."), member("train/out/x-99.png"))),
    Case("a hard link in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/red/x-99.png", b"", tarfile.LNKTYPE, "/etc/passwd"))),
    Case("devices and pipes in a tar", 0, FORTY_TWO, TAR, tar_with(
        member("train/red/x-97.png", b"", tarfile.CHRTYPE), member("train/red/x-98.png", b"", tarfile.BLKTYPE),
        member("train/red/x-99.png", b"", tarfile.FIFOTYPE))),
    Case("a symbolic link in a zip", 0, FORTY_TWO, ZIP, zip_with("train/red/x-99.png", b"/etc/passwd", 0o120777)),
    Case("a file that is there twice", 65, "'answers.json': must be in the archive once", TAR,
         tar_with(member("answers.json", b"{}"))),
    Case("a file and a folder of one name", 65, "must be a file or a folder, is both", TAR,
         tar_with(member("train/red", b"x"))),
    Case("a zip that is a bomb", 65, "must not unpack to more than 1.1 GB, declares more", ZIP, zip_bomb),
    Case("a tar.gz that is a bomb", 65, "must not unpack to more than 1.1 GB", GZ, tar_bomb),
    Case("a tar.gz with a header that is a bomb", 65, "a header claims an impossible size", GZ, header_bomb),
    Case("a tar with a sparse file of terabytes", 65, "must not unpack to more than 1.1 GB, declares more", TAR,
         sparse_bomb),
    Case("a tar with a negative size", 65, "must be a whole archive", TAR, negative_tar),
    Case("an archive of nothing that belongs", 65, "must hold train/ and answers.json", ZIP, lambda data: (
        zipfile.ZipFile(data.parent / "data.zip", "w").writestr("x", b""))),
]  # fmt: skip


# --- places ----------------------------------------------------------------------------------------------------------


def read_only(data: Path) -> None:
    (data.parent / "closed").mkdir()
    (data.parent / "closed").chmod(0o555)


PLACES = [
    Case("an output that is a file", 78, "answers.json", {"OUTPUT": "{data}/answers.json"}),
    Case("an output below a file", 78, "answers.json/out", {"OUTPUT": "{data}/answers.json/out"}),
    Case("an output that no file can be made in", 74, "/proc", {"OUTPUT": "/proc/none"}),
    Case("an output among the images", 78, "OUTPUT: must not be among the images", {"OUTPUT": "{data}/train/out"}),
    Case("an output that is a split", 78, "OUTPUT: must not be among the images", {"OUTPUT": "{data}/val"}),
    Case("an output among the images by a detour", 78, "OUTPUT: must not be among the images",
         {"OUTPUT": "{data}/../data/test/blue"}),
    Case("an output inside the input, beside the images", 0, "best epoch 1 of 1", {"OUTPUT": "{data}/out"}),
    Case("a working folder among the images", 78, "WORKDIR: must not be among the images", {"WORKDIR": "{data}/train"}),
    Case("a working folder that is a file", 78, "WORKDIR: must be a folder, a file is in its place",
         {"WORKDIR": "{data}/answers.json"}),
    Case("a working folder of another's", 78, "WORKDIR: must be a folder for this job alone",
         {"WORKDIR": "{tmp}/work", **TAR},
         both(archived("tar"), lambda data: (data.parent / "work/data").mkdir(parents=True))),
    Case("a name too long for the file system", 74, "File name too long", {"OUTPUT": "{tmp}/" + "o" * 300}),
    Case("a store without credentials", 77, "credentials are needed", {"TASKS": "s3://bucket/data"},
         environment={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
    Case("a store that is not there", 74, "s3://bucket/data", {"TASKS": "s3://bucket/data"}, environment={
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "5ecre7",
        "AWS_MAX_ATTEMPTS": "1"}),
    Case("a store whose address is none", 78, "s3://bucket/data", {"TASKS": "s3://bucket/data"}, environment={
        "AWS_ENDPOINT_URL": "not an address", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "5ecre7"}),
    Case("authorities that are not there", 78, "AWS_CA_BUNDLE must be a file", {"TASKS": "s3://bucket/data"},
         environment={"AWS_CA_BUNDLE": "/nowhere.pem", "AWS_ENDPOINT_URL": "https://127.0.0.1:9"}),
]  # fmt: skip

CATALOGUE = [*SETTINGS, *ANSWERS, *METADATA, *IMAGES, *NAMES, *ARCHIVES, *PLACES]
