"""Whatever is wrong with the input, the job says what, in one line, with the right code, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.catalogue import CATALOGUE
from tests.catalogue.case import Case
from tests.conftest import Finished, run_job
from tests.forks import Forks
from tests.test_settings import NAMES
from tests.trees import bodies

QUICK = {"MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": "32", "N_EPOCHS": "1", "LR": "0.01", "NUM_WORKERS": "2"}
SECRET = "5ecre7"
"""What the cases have where credentials and signatures are."""
SAMPLE = {"TASKS not set", "a broken image within the limit"}
"""Cases that are processes of their own in every run of the tests."""

Runner = Callable[[tuple[str, ...], dict[str, str]], Finished]


def check(case: Case, shapes: Path, tmp_path: Path, run: Runner) -> None:
    """Run the case in a world of its own, and look at all that is left of it."""
    data, out, temporary = tmp_path / "data", tmp_path / "out", tmp_path / "TMPDIR"
    shutil.copytree(shapes, data)
    temporary.mkdir()
    case.spoil(data)
    before, beside = bodies(data), {path.name for path in tmp_path.iterdir()} | {"out"}
    settings = {
        name: value.replace("{data}", str(data)).replace("{tmp}", str(tmp_path))
        for name, value in ({"TASKS": str(data), "OUTPUT": str(out)} | QUICK | dict(case.settings)).items()
    }
    environment = {f"CROWDLAYER_{name}": value for name, value in settings.items()}
    done = run(case.arguments, environment | {"TMPDIR": str(temporary)} | dict(case.environment))

    assert done.code == case.code, done.stderr
    told = done.last_line if case.code else done.stderr
    assert case.told in told, done.stderr
    assert case.shown in told, done.stderr
    assert "Traceback" not in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines()), done.stderr
    assert len(done.last_line) < 10_000
    assert SECRET not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("crowdlayer: ")]
    assert lines == ([done.last_line] if case.code else [])
    if case.code:
        assert done.stdout == ""
        assert not list(out.rglob("*.json"))
    for published in out.rglob("*"):
        if published.suffix in (".json", ".csv", ".html", ".md", ".yaml"):
            published.read_text(encoding="utf-8")  # or it is no UTF-8
    assert bodies(data).items() >= before.items()
    if "{data}" not in case.settings.get("OUTPUT", ""):
        assert bodies(data) == before
    assert {path.name for path in tmp_path.iterdir()} - {"work"} <= beside
    assert not [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]


def test_the_catalogue_has_a_hundred_cases_with_names_of_their_own() -> None:
    assert len(CATALOGUE) >= 100
    assert [name for name, count in Counter(case.name for case in CATALOGUE).items() if count > 1] == []
    assert {case.name.removeprefix("answers.json: ") for case in CATALOGUE} >= SAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_wrong_in_a_case_that_names_it(name: str) -> None:
    assert [case for case in CATALOGUE if case.code == 78 and name in case.settings and f"{name}: " in case.told]


@pytest.mark.parametrize("case", CATALOGUE, ids=lambda case: case.name)
def test_bad_input_ends_as_it_should(case: Case, shapes: Path, tmp_path: Path, forks: Forks) -> None:
    def run(arguments: tuple[str, ...], environment: dict[str, str]) -> Finished:
        return Finished(*forks.run(list(arguments), dict(os.environ) | environment))

    check(case, shapes, tmp_path, run)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name.split(": ")[-1] in SAMPLE else pytest.mark.slow)
        for case in CATALOGUE
    ],
)
def test_bad_input_ends_as_it_should_in_a_process_of_its_own(
    case: Case, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: tuple[str, ...], environment: dict[str, str]) -> Finished:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return run_job(*arguments)

    check(case, shapes, tmp_path, run)
