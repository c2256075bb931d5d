"""Folders and names of files that are wrong, or unusual."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

from tests.catalogue.case import Case, Spoil, both
from tests.catalogue.images import WHOLE, image


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
