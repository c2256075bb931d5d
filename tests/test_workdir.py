"""The job's folder on this machine: what is ours in it is nobody else's, and what becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from crowdlayer.data.layout import belongs
from crowdlayer.errors import AccessError, SettingsError, StoreError
from crowdlayer.run_folder import DRY_RUN, RUN
from crowdlayer.storage.sync import sync
from crowdlayer.storage.workdir import OURS, working_folder
from tests.conftest import RESULTS, ROOT, Job, Store
from tests.servers import Meddler, late, refused
from tests.trees import bodies, state, write


def test_a_working_folder_is_free_when_its_job_has_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with working_folder(str(tmp_path)) as path:
            with pytest.raises(StoreError, match="another job is using"), working_folder(str(tmp_path)):
                pass
            assert path == tmp_path


KILLED = """
import os, sys
from crowdlayer.storage.workdir import working_folder
with working_folder(None) as folder:
    (folder / "data").touch()
    print(folder, flush=True)
    if sys.argv[1:]:
        sys.stdin.read()
    os._exit(9)
"""


def test_what_a_killed_job_has_left_is_removed_by_the_next_and_what_another_uses_is_not(tmp_path: Path) -> None:
    def started(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, *arguments]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)

    (tmp_path / "crowdlayer-kept-x").mkdir()
    with started("and waits") as living:
        assert living.stdout is not None
        used = Path(living.stdout.readline().strip())
        with started() as killed:
            left = Path(killed.communicate()[0].strip())
        assert {path.name for path in tmp_path.iterdir()} == {used.name, left.name, "crowdlayer-kept-x"}
        with started() as killed:
            again = Path(killed.communicate()[0].strip())
        assert {path.name for path in tmp_path.iterdir()} == {used.name, again.name, "crowdlayer-kept-x"}
        assert (used / "data").exists()


@pytest.mark.parametrize("name", OURS)
def test_what_is_the_users_is_never_removed(name: str, workdir: Path) -> None:
    write(workdir, {f"{name}/thesis.tex" if "." not in name else name: b"years of work"})
    before = state(workdir)
    with (
        pytest.raises(SettingsError, match=rf"WORKDIR: must be a folder for this job alone, .* has {name} of another"),
        working_folder(str(workdir)),
    ):
        pass
    assert {path: what for path, what in state(workdir).items() if path != ".lock"} == before


def test_downloads_that_come_when_the_job_has_ended_leave_nothing(store: Store, meddler: Meddler) -> None:
    """Threads that wait for a store are not waited for, and what they then have is nobody's any more."""
    for i in range(8):
        store.put(f"data/train/{i}/x-{i}.png", b"body")
    meddler.spoil(refused(403, "AccessDenied"), path="x-0.png", times=9)
    for i in range(1, 8):
        meddler.spoil(late(1), path=f"x-{i}.png", times=9)
    with pytest.raises(AccessError), working_folder(None) as workdir:
        sync(f"s3://{store.bucket}/data", workdir, belongs)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join()
    assert not workdir.exists()


def test_a_named_working_folder_keeps_what_was_downloaded(
    shapes: Path, store: Store, meddler: Meddler, tmp_path: Path, train: Job
) -> None:
    tasks, workdir, out = store.put_tree(shapes), tmp_path / "work", str(tmp_path / "out")
    train(TASKS=tasks, WORKDIR=str(workdir), OUTPUT=out)
    assert meddler.count("GET", ".png") == 42
    kept = bodies(workdir).keys()
    assert sum(name.endswith(".png") for name in kept) == 42
    meddler.requests.clear()

    train(TASKS=tasks, WORKDIR=str(workdir), OUTPUT=out, SEED="1")

    assert meddler.count("GET", ".png") == 0
    assert bodies(workdir).keys() == kept
    assert {path.name for path in workdir.iterdir()} <= {*OURS, ".lock", ".crowdlayer"}
    assert {RUN, DRY_RUN} <= {*OURS}


def test_a_working_folder_in_use_by_another_job_is_refused(shapes: Path, tmp_path: Path, train: Job) -> None:
    workdir = tmp_path / "work"
    workdir.mkdir()
    settings = {"TASKS": str(shapes), "WORKDIR": str(workdir), "OUTPUT": str(tmp_path / "out")}

    with FileLock(workdir / ".lock"), pytest.raises(StoreError, match=f"^WORKDIR: .* another job is using {workdir}$"):
        train(**settings)
    assert not (tmp_path / "out").exists()

    train(**settings)
    assert (tmp_path / "out" / RESULTS).is_file()


def test_a_working_folder_that_is_a_file_is_told_without_a_traceback(shapes: Path, tmp_path: Path, train: Job) -> None:
    (tmp_path / "work").touch()

    for inside in ("work", "work/deeper"):
        with pytest.raises(SettingsError, match=f"WORKDIR: must be a folder, a file is in its place: .*{inside}$"):
            train(TASKS=str(shapes), WORKDIR=str(tmp_path / inside))


def test_no_folder_for_temporary_files_is_told_without_a_traceback(
    shapes: Path, tmp_path: Path, train: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(StoreError, match="TMPDIR"):
            train(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))
