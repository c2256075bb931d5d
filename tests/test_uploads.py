"""Checkpoints go to the output while training goes on."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.errors import StoreError
from crowdlayer.learning import uploads as uploads_module
from crowdlayer.learning.checkpoint import Checkpoints
from crowdlayer.learning.spool import Spool
from crowdlayer.learning.uploads import POLL, Uploads
from crowdlayer.machine import interruption
from crowdlayer.storage.places import Folder
from tests.checkpoints import found, new_spool, state


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return new_spool(tmp_path)


class Slow(Folder):
    """An output whose uploads wait until they may, and fail as often as they shall."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may = threading.Event()
        self.asked = threading.Event()
        self.failures = 0
        self.attempts = 0

    def upload(self, source: Path, name: str) -> None:
        self.asked.set()
        self.attempts += 1
        assert self.may.wait(60)
        if self.failures:
            self.failures -= 1
            raise StoreError(f"{name}: the store is away")
        super().upload(source, name)


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(POLL)


def test_of_a_run_that_has_no_best_epoch_yet_the_newest_is_put(tmp_path: Path, spool: Spool) -> None:
    """Two of its parts say nothing, so are the same file."""
    begun = state(0, 3) | {"best": None, "further": None}
    checkpoints = Checkpoints(Folder(tmp_path / "out"), "run")
    with Uploads(spool.folder, checkpoints, background=False) as uploads:
        spool.write(begun)
        assert uploads.finish() == "00000001.json"
    back = found(checkpoints, tmp_path)
    assert back is not None
    assert (back["progress"]["step"], back["best"]) == (3, None)


def test_training_does_not_wait_for_uploads_and_the_newest_is_there_in_the_end(tmp_path: Path, spool: Spool) -> None:
    output = Slow(tmp_path / "out")
    checkpoints = Checkpoints(output, "run")
    with Uploads(spool.folder, checkpoints, background=True) as uploads:
        spool.write(state(1))
        assert output.asked.wait(60)
        for epoch in range(2, 6):
            spool.write(state(epoch))  # while the first is under way
        waiting = {path.suffix for path in spool.folder.iterdir() if path.is_file()}
        assert waiting == {".json", ".pt"}
        assert sum(path.is_file() for path in spool.folder.iterdir()) == 4  # the newest's index and parts alone
        output.may.set()
        assert uploads.finish() == "00000005.json"
    back = found(checkpoints, tmp_path)
    assert back is not None
    assert back["progress"]["epoch"] == 5
    assert not spool.folder.exists()  # what would be left there has not been put


def test_an_upload_that_fails_is_said_and_the_next_goes_well(
    tmp_path: Path, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    output = Slow(tmp_path / "out")
    output.failures = 1
    output.may.set()
    with caplog.at_level(logging.WARNING), Uploads(spool.folder, Checkpoints(output, "run"), True) as uploads:
        spool.write(state(1))
        assert output.asked.wait(60)
        spool.write(state(2))
        assert uploads.finish() == "00000002.json"
    assert "00000001.json could not be put" in caplog.text


def test_a_store_that_is_away_is_not_asked_again_at_once(tmp_path: Path, spool: Spool) -> None:
    output = Slow(tmp_path / "out")
    output.failures = 1
    output.may.set()
    with Uploads(spool.folder, Checkpoints(output, "run"), background=True):
        spool.write(state(1))
        assert output.asked.wait(60)
        time.sleep(5 * POLL)
        assert output.attempts == 1


def test_when_the_training_has_failed_no_upload_begins(tmp_path: Path, spool: Spool) -> None:
    output = Slow(tmp_path / "out")
    output.may.set()
    with pytest.raises(RuntimeError), Uploads(spool.folder, Checkpoints(output, "run"), background=True):
        raise RuntimeError
    spool.write(state(1))
    time.sleep(5 * POLL)
    assert output.attempts == 0


def test_a_checkpoint_that_training_has_just_removed_is_no_error(tmp_path: Path, spool: Spool) -> None:
    spool.write(state(1))
    next(spool.folder.glob("*.pt")).unlink()
    with Uploads(spool.folder, Checkpoints(Folder(tmp_path / "out"), "run"), background=False) as uploads:
        assert uploads.finish() is None
    assert not (tmp_path / "out").exists()


def test_where_files_have_one_name_only_a_checkpoint_is_put_all_the_same(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    with Uploads(
        spool.folder, checkpoints := Checkpoints(Folder(tmp_path / "out"), "run"), background=False
    ) as uploads:
        spool.write(state(1))
        assert uploads.finish() == "00000001.json"
    assert found(checkpoints, tmp_path) is not None


def eventually(path: Path) -> bool:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


def test_after_a_failure_the_next_is_put_without_waiting_for_the_end(tmp_path: Path, spool: Spool) -> None:
    output = Slow(tmp_path / "out")
    output.failures = 1
    output.may.set()
    put = tmp_path / "out/checkpoints/run/00000002.json"
    with Uploads(spool.folder, Checkpoints(output, "run"), background=True):
        spool.write(state(1))
        assert output.asked.wait(60)
        spool.write(state(2))
        assert eventually(put)


def test_a_failure_is_tried_again_though_no_other_checkpoint_comes(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "AGAIN", 3 * POLL)
    output = Slow(tmp_path / "out")
    output.failures = 1
    output.may.set()
    with Uploads(spool.folder, Checkpoints(output, "run"), background=True):
        spool.write(state(1))
        assert eventually(tmp_path / "out/checkpoints/run/00000001.json")


def test_with_none_while_it_trains_the_last_is_put_as_soon_as_a_signal_is_heard(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CHECKPOINT_EVERY=0: the run may be in what it cannot be stopped in, for longer than it has."""
    output = Slow(tmp_path / "out")
    output.may.set()
    with Uploads(spool.folder, Checkpoints(output, "run"), background=False):
        spool.write(state(1))
        time.sleep(5 * POLL)
        assert output.attempts == 0
        monkeypatch.setattr(interruption, "heard", lambda: signal.SIGTERM)
        assert eventually(tmp_path / "out/checkpoints/run/00000001.json")


def test_the_last_upload_must_go_well(tmp_path: Path, spool: Spool) -> None:
    output = Slow(tmp_path / "out")
    output.failures = 1
    output.may.set()
    with Uploads(spool.folder, Checkpoints(output, "run"), background=False) as uploads:
        spool.write(state(1))
        with pytest.raises(StoreError, match="the store is away"):
            uploads.finish()


def test_a_disk_that_fails_for_a_moment_does_not_end_the_uploads(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither before anything waits, nor while it waits to be tried again."""
    monkeypatch.setattr(uploads_module, "AGAIN", 0.5)
    away = tmp_path / "away"
    checkpoints = Checkpoints(Folder(tmp_path / "out"), "run")
    with Uploads(spool.folder, checkpoints, background=True):
        spool.folder.rename(away)
        until(lambda: "could not be put, it will be tried again" in caplog.text)
        time.sleep(3 * POLL)
        away.rename(spool.folder)
        spool.write(state(1))
        until(lambda: found(checkpoints, tmp_path) is not None)
