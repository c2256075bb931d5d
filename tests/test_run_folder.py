"""What runs have left that were killed, or could not put all, is there until they are done."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from crowdlayer.errors import EndedError, StoreError
from crowdlayer.learning.spool import Identity, Spool, newest_of
from crowdlayer.machine.launch import Launch
from crowdlayer.run_folder import DRY_RUN, RUN, SPOOL, STAGED, forget_kept, kept, run_folder, workdir_of
from crowdlayer.storage.workdir import working_folder
from tests.conftest import RESULTS, Job

IDENTITY, ANOTHER = (Identity({"output_name": "run", "lr": lr}, "data") for lr in (0.1, 0.5))


def killed(workdir: Path, *files: str) -> None:
    """As SIGKILL leaves a run's folder."""
    (workdir / RUN / SPOOL).mkdir(parents=True)
    for name in files:
        (workdir / RUN / SPOOL / name).touch()


def failed(workdir: Path, identity: Identity) -> None:
    """As a start leaves WORKDIR that could put neither results nor checkpoint."""
    with suppress(StoreError), run_folder(workdir, RUN) as folder, kept(folder, str(workdir), identity):
        Spool(folder / SPOOL, identity).write({"progress": {"epoch": 1, "step": 0}, "best": {}})
        job = {"settings": identity.settings, "data_digest": identity.data_digest, "files": {}}
        (folder / STAGED / "results").mkdir(parents=True)
        (folder / STAGED / "results/run.json").write_text(json.dumps({"job": job}))
        raise StoreError("the store is away")


def test_the_checkpoint_of_a_killed_run_outlives_starts_that_could_not_take_it_and_other_runs(tmp_path: Path) -> None:
    killed(tmp_path, "00000001.json")
    with suppress(StoreError), run_folder(tmp_path, RUN):
        raise StoreError("the store is away")
    killed(tmp_path)  # before it trained
    with suppress(StoreError), run_folder(tmp_path, RUN):
        raise StoreError("the store is away")
    killed(tmp_path, "00000002.json")
    with run_folder(tmp_path, RUN) as folder:
        assert [path.name for path in folder.iterdir()] == [SPOOL]
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["00000001.json", "00000002.json"]
    assert {path.parent.parent.name[:16] for path in tmp_path.rglob("*.json")} == {"crowdlayer-kept-"}


def test_of_a_killed_dry_run_nothing_is_kept(tmp_path: Path) -> None:
    killed(tmp_path, "00000001.json")
    (tmp_path / RUN).rename(tmp_path / DRY_RUN)
    with run_folder(tmp_path, DRY_RUN):
        pass
    assert not list(tmp_path.iterdir())


def test_of_a_run_that_fails_again_the_last_start_is_kept_and_nothing_when_it_is_done(tmp_path: Path) -> None:
    for identity in (ANOTHER, IDENTITY, IDENTITY):
        failed(tmp_path, identity)
    assert len(list(tmp_path.iterdir())) == 2
    forget_kept(tmp_path, IDENTITY)
    (left,) = tmp_path.iterdir()
    assert sorted(path.name for path in left.iterdir()) == [SPOOL, STAGED]
    assert newest_of(left / SPOOL, ANOTHER) == "00000001.json"


@pytest.mark.parametrize(
    "error", [EndedError("a process was killed", 137), StoreError("the disk"), ValueError("a fault")]
)
def test_whatever_ends_a_run_what_it_has_not_put_is_kept(error: Exception, tmp_path: Path) -> None:
    with suppress(type(error)), run_folder(tmp_path, RUN) as folder, kept(folder, str(tmp_path), IDENTITY):
        (folder / SPOOL / "00000001.json").touch()
        raise error
    (left,) = tmp_path.rglob("*.json")
    assert left.parent.parent.name.startswith("crowdlayer-kept-")


def test_nodes_that_share_a_file_system_have_a_working_folder_each(tmp_path: Path) -> None:
    first, second = (workdir_of(str(tmp_path), Launch("explicit", 2, node)) for node in range(2))
    with working_folder(first), working_folder(second):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["node-0", "node-1"]
    assert workdir_of(str(tmp_path), Launch()) == str(tmp_path)
    assert workdir_of(None, Launch("explicit", 2, 1)) is None


@pytest.mark.parametrize("killed", [False, True])
def test_what_could_not_be_put_is_put_by_the_next_start_in_the_same_folder(
    shapes: Path, tmp_path: Path, train: Job, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    """Here the output can take neither the model nor the checkpoints.

    A job that is killed leaves them in the folder of its run.
    """
    out, work = tmp_path / "out", tmp_path / "work"
    (out / "best_models").mkdir(parents=True)
    (out / "best_models/crowdlayer.pth").mkdir()
    (out / "checkpoints").touch()
    settings = {"TASKS": str(shapes), "OUTPUT": str(out), "WORKDIR": str(work)}
    with pytest.raises(StoreError, match="best_models"):
        train(**settings)
    (out / "best_models/crowdlayer.pth").rmdir()
    (out / "checkpoints").unlink()
    (kept,) = work.glob("crowdlayer-kept-*")
    theirs = json.loads((kept / "results" / RESULTS).read_text())
    if killed:
        (work / "run").mkdir()
        (kept / "checkpoints").rename(work / "run/checkpoints")
    with caplog.at_level("INFO"):
        train(**settings)
    assert "kept on this machine by an earlier start, is put now" in caplog.text
    assert "going on from checkpoint" in caplog.text
    assert json.loads((out / RESULTS).read_text())["train_loss"] == theirs["train_loss"]
    assert not (out / "checkpoints").exists()
    assert not [*work.glob("run*"), *work.glob("crowdlayer-kept-*")]
