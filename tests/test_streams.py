"""Standard output and error that nobody reads, on a full disk, or closed: work and exit code are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

CONVERT = [sys.executable, "-m", "crowdlayer.answers", "convert"]


@contextmanager
def without_a_reader() -> Iterator[int]:
    """A pipe whose other end is closed, as `… 2>&1 | tee log` leaves it on Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_disk() -> Iterator[int]:
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.json"
    path.write_text('{"0": {"anna": "cat"}}')
    return path


@pytest.mark.parametrize("unread", [without_a_reader, full_disk])
def test_a_command_does_its_work_for_nobody(unread: Callable[[], AbstractContextManager[int]], answers: Path) -> None:
    table = answers.with_suffix(".csv")
    with unread() as stream:
        done = subprocess.run([*CONVERT, str(answers), str(table)], cwd=ROOT, stdout=stream, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert table.read_text().splitlines() == ["task,worker,label", "0,anna,cat"]
        assert subprocess.run([*CONVERT, "--help"], cwd=ROOT, stdout=stream).returncode == 0
        assert subprocess.run([*CONVERT, str(answers)], cwd=ROOT, stderr=stream).returncode == 78


def test_all_three_may_be_closed(answers: Path) -> None:
    table = answers.with_suffix(".csv")
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *CONVERT]
    assert subprocess.run([*closed, str(answers), str(table)], cwd=ROOT).returncode == 0
    assert table.read_text().splitlines() == ["task,worker,label", "0,anna,cat"]
    assert subprocess.run([*closed, str(answers), "answers.txt"], cwd=ROOT).returncode == 78
