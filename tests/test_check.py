"""--check is a table with a remedy for all that is not ok; --dry-run is one step on every device."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdlayer import check as check_module
from crowdlayer import job
from crowdlayer.errors import AccessError, CrowdlayerError, DataError, DeviceMemoryError, SettingsError, StoreError
from crowdlayer.learning import experiment
from crowdlayer.learning.trainer import Trainer
from crowdlayer.settings import load_settings
from tests.conftest import QUICK, Store, run_job, variables
from tests.crowds import write_shapes

Rows = dict[str, tuple[str, str, str]]


@pytest.fixture
def look(caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[Rows, Any]]:
    """Check; gives state, what was found and the remedy for each row, and the error that was raised."""

    def run(**settings: str) -> tuple[Rows, Any]:
        caplog.clear()
        error = None
        with variables(**(QUICK | {"N_EPOCHS": "60"} | settings)), caplog.at_level(logging.INFO, "crowdlayer"):
            try:
                check_module.check(load_settings())
            except CrowdlayerError as raised:
                error = raised
        shown = [vars(record) for record in caplog.records if hasattr(record, "check")]
        return {row["check"]: (row["state"], row["found"], row["remedy"]) for row in shown}, error

    return run


def test_a_sound_data_set_is_ok_in_every_row(tmp_path: Path, look: Callable[..., tuple[Rows, Any]]) -> None:
    data = write_shapes(tmp_path / "data", n_train=90)
    before = sorted(data.rglob("*"))
    rows, error = look(TASKS=str(data), FOLDS="5", BASELINES="majority")
    assert error is None
    expected = ["settings", "nodes", "model", "output", "data set", "resume", "images", "disk", "devices"]
    expected += ["memory", "evaluation", "time"]
    assert {name: state for name, (state, _, _) in rows.items()} == dict.fromkeys(expected, "ok")
    assert rows["resume"][1] == "a run would begin"
    assert "90 tasks" in rows["data set"][1]
    assert "an object was written, read back and deleted" in rows["output"][1]
    assert "60 epochs of 6 steps" in rows["time"][1]
    assert "each, 6 times (FOLDS and BASELINES); " in rows["time"][1]  # five with a fifth of the tasks less are four
    assert sorted(data.rglob("*")) == before


def test_what_a_run_would_go_on_from_is_looked_at_and_left(
    tmp_path: Path, look: Callable[..., tuple[Rows, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    settings = {"TASKS": str(write_shapes(tmp_path / "data")), "OUTPUT": str(out), "N_EPOCHS": "2"}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what cannot be put is kept there
    rows, error = look(**settings, RESUME="must")
    assert isinstance(error, SettingsError)
    assert "must find a checkpoint" in rows["resume"][1]
    (out / "best_models/crowdlayer.pth").mkdir(parents=True)  # where the model cannot be put checkpoints stay
    assert look(**settings, RESUME="auto")[0]["resume"][:2] == ("ok", "a run would begin")
    with variables(**(QUICK | settings)), pytest.raises(StoreError, match="best_models"):
        job.train(load_settings())
    before = sorted(out.rglob("*"))
    assert re.fullmatch(r"a run would go on from checkpoint \d+", look(**settings)[0]["resume"][1])
    rows, error = look(**settings, LR="0.02")
    assert rows["resume"][0] == "error"
    assert "must be this run's: LR was 0.01 and is 0.02" in str(error)
    assert look(**settings, RESUME="never")[0]["resume"][:2] == ("ok", "a run would begin")
    assert sorted(out.rglob("*")) == before


def test_a_row_that_is_not_ok_has_its_remedy(tmp_path: Path, look: Callable[..., tuple[Rows, Any]]) -> None:
    data = write_shapes(tmp_path / "data")
    (data / "train" / "red" / "square-999.png").write_bytes((data / "train" / "red" / "square-2.png").read_bytes())
    (data / "test" / "red" / "torn.png").write_bytes(b"torn")
    rows, error = look(TASKS=str(data), MAX_BAD_IMAGES="0.5")
    assert error is None
    assert rows["data set"][0] == rows["images"][0] == "warning"
    assert "left out: 1 images without answers" in rows["data set"][1]
    assert "1 are broken, test/red/torn.png" in rows["images"][1]
    assert rows["advice"][2] == "BATCH_SIZE=8"
    assert all(remedy for state, _, remedy in rows.values() if state != "ok")


def test_one_error_does_not_hide_another_and_the_first_decides_the_exit_code(
    tmp_path: Path, look: Callable[..., tuple[Rows, Any]]
) -> None:
    data = write_shapes(tmp_path / "data")
    (data / "answers.json").write_text('{"0": {"a": 77}}')
    (tmp_path / "file").write_text("")
    rows, error = look(TASKS=str(data), OUTPUT=str(tmp_path / "file" / "below"))
    assert (rows["output"][0], rows["data set"][0]) == ("error", "error")
    assert rows["nodes"][0] == rows["model"][0] == "ok"
    assert "label 77" in rows["data set"][1]
    assert all(remedy for state, _, remedy in rows.values() if state == "error")
    assert error is not None
    assert str(error) == rows["output"][1]


def test_a_disk_without_room_for_checkpoints_is_a_warning(
    shapes: Path, look: Callable[..., tuple[Rows, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500 * 10**6))
    rows, error = look(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"), MODEL="resnet18")
    assert error is None
    state, found, remedy = rows["disk"]
    assert (state, remedy) == ("warning", "a larger disk, or WORKDIR on another")
    assert found.startswith("0.5 GB free at ")
    assert found.endswith("; checkpoints may take 0.6 GB")


def test_too_little_memory_is_found_by_a_step(
    shapes: Path, look: Callable[..., tuple[Rows, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def too_large(*args: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_epoch", too_large)
    rows, error = look(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))
    assert isinstance(error, DeviceMemoryError)
    assert rows["devices"][2] == "lower BATCH_SIZE or IMG_SIZE, or take a smaller MODEL"


def test_a_step_that_takes_nearly_all_memory_is_a_warning(
    shapes: Path, look: Callable[..., tuple[Rows, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check_module, "NEARLY_ALL", 1e-3)
    rows, error = look(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))
    assert error is None
    state, found, remedy = rows["memory"]
    assert (state, remedy) == ("warning", "lower BATCH_SIZE or IMG_SIZE, or take a smaller MODEL")
    assert re.fullmatch(r"\d+\.\d of \d+\.\d GB used by a step", found)


def test_the_memory_of_all_processes_of_a_node_is_counted_and_what_the_evaluation_will_take(tmp_path: Path) -> None:
    """In a process of its own, lest that of other tests count."""
    data = write_shapes(tmp_path / "data")
    answers = {str(task): {f"{task} {worker}": task % 3 for worker in range(100)} for task in range(24)}
    (data / "answers.json").write_text(json.dumps(answers))
    classes = ",".join(["blue", "green", "red", *(f"none {i}" for i in range(97))])

    at = {"TASKS": str(data), "CLASSES": classes, "MODEL": "resnet18", "N_PROCESSES": "2", "LOG_FORMAT": "json"}
    done = run_job("--check", timeout=300, **QUICK | at)

    found = {row["check"]: row["found"] for row in map(json.loads, done.stderr.splitlines()) if "check" in row}
    assert found["evaluation"].endswith(" GB used by matrices of 2400 workers for 100 classes")
    step, evaluation = (float(found[row].split()[0]) for row in ("memory", "evaluation"))
    assert step > 1.3  # twice what one takes, of which the libraries and the crowd layer are 0.8
    assert 2.2 < evaluation < 3  # twice 12 bytes × 2400 × 100 × 100 and 0.15 GB beside what a process has anyway


def test_where_memory_is_too_little_for_the_workers_matrices_no_smaller_network_is_asked_for(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(experiment, "infer", too_large)
    at = QUICK | {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out")}
    with (
        variables(**at),
        pytest.raises(DeviceMemoryError, match=r"^out of memory with matrices of \d+ workers .*: lower N_PROC"),
    ):
        job.train(load_settings())


def test_of_all_processes_of_a_run_one_looks_at_a_node_and_one_at_the_output(
    tmp_path: Path, look: Callable[..., tuple[Rows, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would find WORKDIR taken, and the object that they wrote deleted."""
    second = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in second.items():
        monkeypatch.setenv(name, value)
    at = {"TASKS": str(write_shapes(tmp_path / "data")), "WORKDIR": str(tmp_path / "work")}
    assert look(**at, OUTPUT="/proc/nowhere") == ({}, None)
    assert not (tmp_path / "work").exists()
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():  # of a node of its own
        monkeypatch.setenv(name, value)
    rows, error = look(**at, OUTPUT="/proc/nowhere")
    assert error is None
    assert {"nodes", "data set", "devices"} <= rows.keys()
    assert "output" not in rows


def test_every_kind_of_error_has_a_remedy() -> None:
    assert {SettingsError, DataError, AccessError, DeviceMemoryError} <= check_module.REMEDIES.keys()


def test_a_check_in_json_is_a_record_per_row_and_has_a_runs_exit_codes(shapes: Path, tmp_path: Path) -> None:
    """A process, as a platform starts it."""
    at = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "LOG_FORMAT": "json"}
    done = run_job("--check", timeout=300, **QUICK, **at)
    assert (done.code, done.stdout) == (0, "")
    rows = [json.loads(line) for line in done.stderr.splitlines() if '"check"' in line]
    assert {row["state"] for row in rows} <= {"ok", "warning"}
    assert all({"check", "state", "found", "remedy", "message", "level", "time"} <= row.keys() for row in rows)
    assert not (tmp_path / "out").exists()


def test_a_check_reports_and_leaves_the_bucket_as_it_was(
    shapes: Path, store: Store, check: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tasks = store.put_tree(shapes)
    before = store.keys()

    check(TASKS=tasks)

    assert store.keys() == before
    for told in (
        "24 tasks",
        "9 validation and 9 test images",
        f"{tasks}: an object was written",
        QUICK["MODEL"],
        "cpu",
    ):
        assert told in caplog.text
    assert "epoch 1" not in caplog.text


def test_a_check_keeps_folders_that_were_there(shapes: Path, tmp_path: Path, check: Callable[..., None]) -> None:
    (tmp_path / "out" / "results").mkdir(parents=True)

    check(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))

    assert sorted((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "results"]


def dry_run(**settings: str) -> None:
    with variables(**(QUICK | settings)):
        job.dry_run(load_settings())


def test_a_dry_run_takes_one_step_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_shapes(tmp_path / "data", n_train=60)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    trackers = {"METRICS_FILE": str(tmp_path / "told/figures.prom"), "TENSORBOARD": str(tmp_path / "told")}
    with caplog.at_level(logging.INFO, "crowdlayer"):
        dry_run(TASKS=str(data), OUTPUT=str(tmp_path / "out"), **trackers)
    assert "1 epochs of 1 steps" in caplog.text
    assert "dry run passed: a step on cpu" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [data]


def test_a_dry_run_without_val_holds_tasks_out_as_a_run_does(tmp_path: Path) -> None:
    dry_run(TASKS=str(write_shapes(tmp_path / "data", n_val=0, n_test=0)))


@pytest.mark.slow
def test_a_dry_run_is_one_step_on_every_process(shapes: Path, tmp_path: Path) -> None:
    at = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "N_PROCESSES": "2"}
    done = run_job("--dry-run", timeout=500, **QUICK, **at)
    assert (done.code, done.stdout) == (0, ""), done.stderr
    assert "dry run passed: a step on cpu, cpu" in done.stderr
