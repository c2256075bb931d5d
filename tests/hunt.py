"""make hunt: libFuzzer, which sees what code a mutation reaches, on what the job reads; for minutes or hours.

Needs atheris, which is no part of the dev extra: it has wheels for some Pythons only.

    python -m tests.hunt answers|export|metadata|names|index [libFuzzer's options]
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["crowdlayer"]):
    from crowdlayer.answers.convert import answers_in
    from crowdlayer.answers.files import read_answers
    from crowdlayer.data.classes import read_metadata
    from crowdlayer.errors import CrowdlayerError, one_line
    from crowdlayer.learning.checkpoint import Checkpoints
    from crowdlayer.learning.spool import Identity
    from crowdlayer.storage.files import safe_names
    from crowdlayer.storage.places import Folder

FOLDER = Path(tempfile.mkdtemp(prefix="hunt-"))
(FOLDER / "checkpoints/run").mkdir(parents=True)


def answers(body: bytes) -> None:
    (FOLDER / "answers.json").write_bytes(body)
    read_answers(FOLDER / "answers.json")


def export(body: bytes) -> None:
    (FOLDER / "export.json").write_bytes(body)
    list(answers_in(FOLDER / "export.json"))


def metadata(body: bytes) -> None:
    (FOLDER / "metadata.json").write_bytes(body)
    read_metadata(FOLDER / "metadata.json")


def names(body: bytes) -> None:
    some = body.decode("utf-8", "surrogateescape").split("\n")
    safe_names(some)
    assert all((FOLDER / name).resolve().is_relative_to(FOLDER.resolve()) for name in some)


def index(body: bytes) -> None:
    (FOLDER / "checkpoints/run/00000001.json").write_bytes(body)
    Checkpoints(Folder(FOLDER), "run").find(Identity({"lr": 0.1}, "data"), "auto", FOLDER)


def target(body: bytes) -> None:
    """Whatever is not one of our errors, of one line, is a find."""
    try:
        TARGETS[sys.argv[1]](body)
    except CrowdlayerError as error:
        said = str(error)
    else:
        return
    assert one_line(said).isprintable()
    assert len(said) < 20_000


TARGETS = {"answers": answers, "export": export, "metadata": metadata, "names": names, "index": index}

SEEDS = {
    "answers": b'{"0": {"w": 1, "v": "a"}, "007": {"w": 0.0}}',
    "export": b'[{"data": {"image": "a.png"}, "annotations": ['
    b'{"completed_by": 1, "result": [{"type": "choices", "value": {"choices": ["a"]}}]}]}]',
    "metadata": b'{"name": "x", "n_classes": 3, "classes": ["a", "b", "c"], "n_workers": 9}',
    "names": b"train/a/x-0.png\n../x\nC:x\n/x",
    "index": b'{"format": 3, "settings": {"lr": 0.1}, "data_digest": "data", "parts": {"best": ["0.pt", 5]}}',
}

if __name__ == "__main__":
    logging.disable()
    (FOLDER / "seeds").mkdir()
    (FOLDER / "seeds/one").write_bytes(SEEDS[sys.argv[1]])
    with contextlib.suppress(KeyboardInterrupt):
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(FOLDER / "seeds")], target)
        atheris.Fuzz()
