"""From where the data is to where the results go, and what is done once is not done again."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from crowdlayer import job
from crowdlayer.errors import SettingsError
from crowdlayer.learning.checkpoint import Checkpoints
from crowdlayer.learning.spool import Identity, Spool
from crowdlayer.settings import load_settings
from crowdlayer.storage.places import place
from tests.conftest import MODEL, QUICK, RESULTS, Job, Store, results_in, run_job, variables
from tests.crowds import write_shapes
from tests.trees import bodies

# --- from where to where ---------------------------------------------------------------------------------------------


def test_bucket_to_bucket_adds_the_results_and_nothing_else_and_tells_no_secret(
    shapes: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process, as a platform starts it."""
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "AWS_SESSION_TOKEN": "FQoGZXIvYXdzEOEXAMPLETOKEN",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    tasks = store.put_tree(shapes)
    before = store.keys()

    done = run_job(timeout=300, TASKS=tasks, **QUICK)

    assert (done.code, done.stdout) == (0, f"{tasks}/{RESULTS}\n"), done.stderr
    results = json.loads(store.get(f"data/{RESULTS}"))
    written = {f"data/{name}" for name in (RESULTS, *results["job"]["files"])}
    assert set(store.keys()) == set(before) | written
    assert {f"data/{MODEL}", "data/results/crowdlayer/labels.csv", "data/results/crowdlayer/workers.csv"} <= written
    told = [done.stdout.encode(), done.stderr.encode(), *map(store.get, sorted(written))]
    assert not any(secret.encode() in text for secret in secrets.values() for text in told)


def test_output_elsewhere_leaves_the_data_set_untouched(shapes: Path, store: Store, train: Job) -> None:
    tasks = store.put_tree(shapes)
    before = store.keys()

    location = train(TASKS=tasks, OUTPUT=f"s3://{store.bucket}/out/here", OUTPUT_NAME="run-1")

    assert location == f"s3://{store.bucket}/out/here/results/run-1.json"
    files = json.loads(store.get("out/here/results/run-1.json"))["job"]["files"]
    assert "best_models/run-1.pth" in files
    assert set(store.keys()) - set(before) == {f"out/here/{name}" for name in ("results/run-1.json", *files)}


def test_a_folder_gets_its_results_beside_the_data(tmp_path: Path, train: Job) -> None:
    data = write_shapes(tmp_path / "data")
    before = bodies(data)

    assert train(TASKS=str(data)) == str(data / RESULTS)

    assert bodies(data).keys() == {*before, RESULTS, *results_in(data)["job"]["files"]}


def zipped(folder: Path, archive: Path, below: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, f"{below}{path.relative_to(folder)}")
    return archive


def test_an_archive_gets_its_results_beside_it(shapes: Path, tmp_path: Path, train: Job) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    archive = zipped(shapes, folder / "shapes.zip", below="shapes/")

    assert train(TASKS=str(archive)) == str(folder / RESULTS)

    assert bodies(folder).keys() == {"shapes.zip", RESULTS, *results_in(folder)["job"]["files"]}


def test_an_archive_at_the_root_of_a_bucket_gets_its_results_there(
    shapes: Path, tmp_path: Path, store: Store, train: Job
) -> None:
    store.put("shapes.zip", zipped(shapes, tmp_path / "shapes.zip").read_bytes())

    assert train(TASKS=f"s3://{store.bucket}/shapes.zip") == f"s3://{store.bucket}/{RESULTS}"

    files = json.loads(store.get(RESULTS))["job"]["files"]
    assert set(store.keys()) == {"shapes.zip", RESULTS, *files}


def without_job(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "job"}


def test_folder_bucket_and_archive_are_the_same_data_and_give_the_same_results(
    shapes: Path, tmp_path: Path, store: Store, train: Job
) -> None:
    places = {
        "folder": str(shapes),
        "bucket": store.put_tree(shapes, "data/birds"),
        "archive": str(zipped(shapes, tmp_path / "shapes.zip")),
    }
    found = {}
    for name, tasks in places.items():
        train(TASKS=tasks, OUTPUT=str(tmp_path / name))
        found[name] = results_in(tmp_path / name)

    assert len({results["job"]["data_digest"] for results in found.values()}) == 1
    assert len({results["job"]["files"][MODEL] for results in found.values()}) == 1
    assert without_job(found["folder"]) == without_job(found["bucket"]) == without_job(found["archive"])
    called = [found[place]["job"]["data_set"] for place in places]
    assert called == [shapes.name, "birds", "shapes"]


@pytest.mark.parametrize(
    ("variable", "warned"),
    [("AWS_BATCH_JOB_ARRAY_INDEX", True), ("JOB_COMPLETION_INDEX", True), ("SLURM_ARRAY_TASK_ID", False)],
)
def test_elements_of_an_array_that_all_put_the_same_are_warned_about(
    variable: str,
    warned: bool,
    tmp_path: Path,
    train: Job,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(SettingsError):
        train(TASKS=str(tmp_path / "nothing"))
    said = f"{variable}=3 without SWEEP: all elements of the array put OUTPUT_NAME=crowdlayer"
    assert (said in caplog.text) == warned


# --- once and again --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(shapes: Path, tmp_path: Path, train: Job) -> None:
    found = {}
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        train(TASKS=str(shapes), OUTPUT=str(tmp_path / name), SEED=seed, DATA_AUGMENTATION="true")
        found[name] = results_in(tmp_path / name)

    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "again" / MODEL).read_bytes()
    assert without_job(found["one"]) == without_job(found["again"])
    assert (tmp_path / "one" / MODEL).read_bytes() != (tmp_path / "other" / MODEL).read_bytes()
    assert found["one"]["train_loss"] != found["other"]["train_loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set trained on as "shapes" in the current folder, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    write_shapes(folder / "shapes")
    with chdir(folder), variables(**QUICK | {"N_EPOCHS": "1", "TASKS": "shapes"}):
        job.train(load_settings())
    return folder / "shapes"


def _nothing(data: Path) -> None:
    pass


def _an_answer_changed(data: Path) -> None:
    answers = json.loads((data / "answers.json").read_text())
    answers["0"]["3"] = (answers["0"]["3"] + 1) % 3
    (data / "answers.json").write_text(json.dumps(answers))


def _an_image_changed(data: Path) -> None:
    shutil.copy(data / "train" / "red" / "square-2.png", data / "train" / "red" / "square-5.png")


def _the_model_is_gone(data: Path) -> None:
    (data / MODEL).unlink()


def _the_results_are_gone(data: Path) -> None:
    (data / RESULTS).unlink()


def _the_results_are_peerannots(data: Path) -> None:
    (data / RESULTS).write_text(json.dumps({"train_loss": [1.0], "test_accuracy": 97.5}))


def _the_results_are_torn(data: Path) -> None:
    (data / RESULTS).write_bytes((data / RESULTS).read_bytes()[:100])


@pytest.mark.parametrize(
    ("meanwhile", "settings", "again"),
    [
        (_nothing, {}, False),
        (_nothing, {"NUM_WORKERS": "1", "LOG_FORMAT": "json", "VERBOSE": "false"}, False),
        (_nothing, {"SEED": "1"}, True),
        (_nothing, {"LR": "0.02"}, True),
        (_an_answer_changed, {}, True),
        (_an_image_changed, {}, True),
        (_the_model_is_gone, {}, True),
        (_the_results_are_gone, {}, True),
        (_the_results_are_peerannots, {}, True),
        (_the_results_are_torn, {}, True),
    ],
)
def test_a_run_is_done_again_exactly_when_something_in_it_changed(
    trained: Path,
    tmp_path: Path,
    train: Job,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[Path], None],
    settings: dict[str, str],
    again: bool,
) -> None:
    shutil.copytree(trained, tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)  # where it lies is one of the settings
    meanwhile(Path("shapes"))
    results = Path("shapes") / RESULTS
    before = results.stat().st_mtime_ns if results.exists() else None

    train(TASKS="shapes", **settings)

    assert (results.stat().st_mtime_ns != before) == again
    assert (Path("shapes") / MODEL).is_file()
    assert results_in(Path("shapes"))["job"]["settings"]["tasks"] == "shapes"


def test_the_same_data_elsewhere_is_the_same_run(
    shapes: Path, tmp_path: Path, train: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))
    shutil.copytree(shapes, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    caplog.clear()

    train(TASKS="moved/", OUTPUT="out")

    assert "already done" in caplog.text


def test_a_check_says_that_a_run_would_do_nothing(
    trained: Path, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(trained.parent)

    check(TASKS="shapes", N_EPOCHS="1")

    assert "already done" in caplog.text


def test_a_run_that_is_done_leaves_the_checkpoint_of_another(shapes: Path, tmp_path: Path, train: Job) -> None:
    """Of the same name, and interrupted since."""
    out = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out")}
    train(**out)
    folder = tmp_path / "spool"
    folder.mkdir()
    other = Spool(folder, Identity({"lr": 0.5}, "other data"))
    other.write({"progress": {"epoch": 1, "step": 0}, "best": {}})
    Checkpoints(place(out["OUTPUT"]), "crowdlayer").put(folder, "00000001.json")
    before = bodies(tmp_path / "out")
    train(**out)
    assert bodies(tmp_path / "out") == before
