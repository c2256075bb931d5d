"""From where the data is to where the results go: folders, buckets, archives; what is written, and in which order."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from crowdlayer import job
from crowdlayer.check import check as run_check
from crowdlayer.errors import AccessError, DataError, SettingsError, StoreError
from crowdlayer.learning.checkpoint import Checkpoints
from crowdlayer.learning.spool import Identity, Spool
from crowdlayer.run_folder import DRY_RUN, RUN
from crowdlayer.settings import load_settings
from crowdlayer.storage.places import place
from crowdlayer.storage.workdir import OURS
from tests.conftest import QUICK, Store, run_job
from tests.crowds import write_shapes
from tests.servers import Answer, Meddler, Spoiler, meddling, refused

RESULTS, MODEL = "results/crowdlayer.json", "best_models/crowdlayer.pth"

Job = Callable[..., str]


@pytest.fixture
def _tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TMPDIR, which has to be empty again at the end."""
    folder = tmp_path / "TMPDIR"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")] == []


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, _tmpdir: None) -> Job:
    """Train in this process, on the settings named beside the quick ones, one epoch; gives the results' location."""

    def run(**settings: str) -> str:
        with monkeypatch.context() as environment:
            for name, value in (QUICK | {"N_EPOCHS": "1"} | settings).items():
                environment.setenv(f"CROWDLAYER_{name}", value)
            return job.train(load_settings())

    return run


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, _tmpdir: None) -> Callable[..., None]:
    """Check in this process."""

    def run(**settings: str) -> None:
        with monkeypatch.context() as environment:
            for name, value in (QUICK | settings).items():
                environment.setenv(f"CROWDLAYER_{name}", value)
            run_check(load_settings())

    return run


@pytest.fixture
def proxy(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meddler]:
    """Between the job and the store."""
    with meddling(os.environ["AWS_ENDPOINT_URL"]) as meddler:
        monkeypatch.setenv("AWS_ENDPOINT_URL", meddler.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield meddler


def read(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / RESULTS).read_text())
    return results


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def without_job(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "job"}


def put_by(proxy: Meddler) -> list[str]:
    """The names below the bucket of what was put, in order."""
    return [r.path.partition("?")[0].split("/", 2)[2] for r in proxy.requests if r.method == "PUT"]


def not_taken(store: Store, key: str, status: int, code: str) -> Spoiler:
    """The store refuses an object, and does not have it."""

    def spoiler(answer: Answer) -> None:
        store.client.delete_object(Bucket=store.bucket, Key=key)
        refused(status, code)(answer)

    return spoiler


def zipped(folder: Path, archive: Path, below: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, f"{below}{path.relative_to(folder)}")
    return archive


# --- where from, where to --------------------------------------------------------------------------------------------


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
    before = files_below(data)

    assert train(TASKS=str(data)) == str(data / RESULTS)

    assert set(files_below(data)) == {*before, RESULTS, *read(data)["job"]["files"]}


def test_an_archive_gets_its_results_beside_it(shapes: Path, tmp_path: Path, train: Job) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    archive = zipped(shapes, folder / "shapes.zip", below="shapes/")

    assert train(TASKS=str(archive)) == str(folder / RESULTS)

    assert set(files_below(folder)) == {"shapes.zip", RESULTS, *read(folder)["job"]["files"]}


def test_an_archive_at_the_root_of_a_bucket_gets_its_results_there(
    shapes: Path, tmp_path: Path, store: Store, train: Job
) -> None:
    store.put("shapes.zip", zipped(shapes, tmp_path / "shapes.zip").read_bytes())

    assert train(TASKS=f"s3://{store.bucket}/shapes.zip") == f"s3://{store.bucket}/{RESULTS}"

    files = json.loads(store.get(RESULTS))["job"]["files"]
    assert set(store.keys()) == {"shapes.zip", RESULTS, *files}


def test_folder_bucket_and_archive_are_the_same_data_and_give_the_same_results(
    shapes: Path, tmp_path: Path, store: Store, train: Job
) -> None:
    places = {
        "folder": str(shapes),
        "bucket": store.put_tree(shapes),
        "archive": str(zipped(shapes, tmp_path / "shapes.zip")),
    }
    found = {}
    for name, tasks in places.items():
        train(TASKS=tasks, OUTPUT=str(tmp_path / name))
        found[name] = read(tmp_path / name)

    assert len({results["job"]["data_digest"] for results in found.values()}) == 1
    assert len({results["job"]["files"][MODEL] for results in found.values()}) == 1
    assert without_job(found["folder"]) == without_job(found["bucket"]) == without_job(found["archive"])


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_the_answers_may_be_elsewhere(tmp_path: Path, store: Store, train: Job, where: str) -> None:
    data, out = write_shapes(tmp_path / "data"), tmp_path / "out"
    answers = (data / "answers.json").rename(tmp_path / "other.json")
    store.put("votes/other.json", answers.read_bytes())
    at = {"folder": str(answers), "bucket": f"s3://{store.bucket}/votes/other.json"}[where]

    train(TASKS=str(data), ANSWERS=at, OUTPUT=str(out))

    assert read(out)["n_tasks"] == 24
    assert read(out)["job"]["settings"]["answers"] == at


def test_answers_that_are_not_there_are_a_wrong_setting(shapes: Path, store: Store, train: Job) -> None:
    for at in ("/nowhere/answers.json", f"s3://{store.bucket}/nowhere.json"):
        with pytest.raises(SettingsError, match=f"^ANSWERS: must be .* at {at}$"):
            train(TASKS=str(shapes), ANSWERS=at)


def test_peerannots_file_of_tasks_leaves_them_out(shapes: Path, tmp_path: Path, train: Job) -> None:
    (tmp_path / "remove.txt").write_text("-1 5\n-1 17\n")

    train(TASKS=str(shapes), PATH_REMOVE=str(tmp_path / "remove.txt"), OUTPUT=str(tmp_path / "out"))

    results = read(tmp_path / "out")
    assert (results["n_tasks"], results["left_out"]["tasks_removed"]) == (22, 2)
    labels = (tmp_path / "out" / "results" / "crowdlayer" / "labels.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in labels} == {str(task) for task in range(24)} - {"5", "17"}


def test_no_folder_for_temporary_files_is_told_without_a_traceback(
    shapes: Path, tmp_path: Path, train: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(StoreError, match="TMPDIR"):
            train(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))


# --- splits that are not there ---------------------------------------------------------------------------------------


def test_without_val_no_true_label_chooses_the_epoch(tmp_path: Path, train: Job) -> None:
    data = write_shapes(tmp_path / "data")
    shutil.rmtree(data / "val")

    train(TASKS=str(data), N_EPOCHS="2", VAL_FRACTION="0.25")

    results = read(data)
    assert results["n_held_out"] == 6
    assert results["n_tasks"] == 24
    assert results["val_accuracy"] == [None, None]
    assert all(isinstance(loss, float) for loss in results["val_loss"])
    assert results["test_accuracy"] is not None


def test_without_test_the_figures_of_test_are_null(tmp_path: Path, train: Job) -> None:
    data = write_shapes(tmp_path / "data")
    shutil.rmtree(data / "test")

    train(TASKS=str(data))

    results = read(data)
    assert [results[name] for name in ("test_loss", "test_accuracy", "test_ece")] == [None] * 3
    assert results["val_accuracy"] != [None]


def test_images_and_answers_alone_are_a_data_set(tmp_path: Path, train: Job) -> None:
    """No val/, no test/, no class folders, no metadata.json."""
    shapes, data = write_shapes(tmp_path / "shapes"), tmp_path / "data"
    (data / "train").mkdir(parents=True)
    for image in (shapes / "train").rglob("*.png"):
        image.rename(data / "train" / image.name)
    (shapes / "answers.json").rename(data / "answers.json")

    train(TASKS=str(data))

    results = read(data)
    assert results["class_names"] == ["0", "1", "2"]
    assert results["train_accuracy"] is None
    assert results["majority_vote_accuracy"] is None
    assert 0 <= results["majority_vote_agreement"] <= 100


# --- once and again --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(shapes: Path, tmp_path: Path, train: Job) -> None:
    found = {}
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        train(TASKS=str(shapes), OUTPUT=str(tmp_path / name), SEED=seed, DATA_AUGMENTATION="true")
        found[name] = read(tmp_path / name)

    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "again" / MODEL).read_bytes()
    assert without_job(found["one"]) == without_job(found["again"])
    assert (tmp_path / "one" / MODEL).read_bytes() != (tmp_path / "other" / MODEL).read_bytes()
    assert found["one"]["train_loss"] != found["other"]["train_loss"]


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
    assert read(Path("shapes"))["job"]["settings"]["tasks"] == "shapes"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set trained on as "shapes" in the current folder, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    write_shapes(folder / "shapes")
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(folder)
        for name, value in (QUICK | {"N_EPOCHS": "1", "TASKS": "shapes"}).items():
            environment.setenv(f"CROWDLAYER_{name}", value)
        job.train(load_settings())
    return folder / "shapes"


# --- the order of writing --------------------------------------------------------------------------------------------


def test_the_results_come_last_and_are_not_there_when_they_cannot_be_put(
    shapes: Path, store: Store, proxy: Meddler, train: Job
) -> None:
    out = {"TASKS": str(shapes), "OUTPUT": f"s3://{store.bucket}/out", "CHECKPOINT_EVERY": "0"}
    proxy.spoil(not_taken(store, f"out/{RESULTS}", 403, "AccessDenied"), method="PUT", path=RESULTS)

    with pytest.raises(AccessError, match=RESULTS):
        train(**out)
    (kept,) = Path(tempfile.gettempdir()).glob("crowdlayer-kept-*")
    assert (kept / "results" / MODEL).is_file()
    shutil.rmtree(kept)

    files = [name for name in put_by(proxy) if not name.endswith(("/.probe", RESULTS))]
    assert f"out/{MODEL}" in files
    assert put_by(proxy)[-1] == f"out/{RESULTS}"
    proxy.requests.clear()

    train(**out)  # it was not done, so it is done now

    assert put_by(proxy)[-1] == f"out/{RESULTS}"
    assert sorted(files) == sorted(f"out/{name}" for name in json.loads(store.get(f"out/{RESULTS}"))["job"]["files"])


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


def test_older_results_are_gone_before_a_new_model_comes(
    shapes: Path, store: Store, proxy: Meddler, train: Job
) -> None:
    out = {"TASKS": str(shapes), "OUTPUT": f"s3://{store.bucket}/out", "CHECKPOINT_EVERY": "0"}
    train(**out)
    files = json.loads(store.get(f"out/{RESULTS}"))["job"]["files"]
    proxy.spoil(not_taken(store, f"out/{MODEL}", 500, "InternalError"), method="PUT", path=MODEL)

    with pytest.raises(StoreError, match=MODEL):
        train(**out, SEED="1")

    assert set(store.keys()) == {f"out/{name}" for name in files} - {f"out/{MODEL}"}
    (kept,) = Path(tempfile.gettempdir()).glob("crowdlayer-kept-*")
    shutil.rmtree(kept)


def test_of_older_results_no_file_stays_that_a_new_run_does_not_have(shapes: Path, tmp_path: Path, train: Job) -> None:
    out = tmp_path / "out"
    train(TASKS=str(shapes), OUTPUT=str(out), EXPORT="torch_export")
    (out / "results/crowdlayer/notes.txt").write_text("mine")
    before = set(files_below(out))
    document = json.loads((out / RESULTS).read_text())
    document["job"]["files"] |= {"../shapes": "", "best_models/crowdlayer/../../x": "", "results/other/a.csv": ""}
    (out / RESULTS).write_text(json.dumps(document))
    for name in ("x", "results/other/a.csv"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()

    train(TASKS=str(shapes), OUTPUT=str(out), SEED="1")

    others = {"x", "results/other/a.csv"}
    assert set(files_below(out)) == before - {"best_models/crowdlayer/model.pt2"} | others


def test_of_older_results_no_file_stays_even_if_a_try_to_replace_them_failed(
    shapes: Path, store: Store, proxy: Meddler, train: Job
) -> None:
    out = {"TASKS": str(shapes), "OUTPUT": f"s3://{store.bucket}/out"}
    train(**out, EXPORT="torch_export")
    export, older = "out/best_models/crowdlayer/model.pt2", store.get("out/best_models/crowdlayer/model.pt2")
    proxy.spoil(refused(403, "AccessDenied"), method="DELETE", path="model.pt2")
    with pytest.raises(AccessError, match=r"model\.pt2"):
        train(**out, SEED="1")
    store.put(export, older)  # which the proxy has let through
    (kept,) = Path(tempfile.gettempdir()).glob("crowdlayer-kept-*")
    shutil.rmtree(kept)

    train(**out, SEED="1")

    assert export not in store.keys()


def test_a_run_that_is_done_leaves_the_checkpoint_of_another(shapes: Path, tmp_path: Path, train: Job) -> None:
    """Of the same name, and interrupted since."""
    out = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out")}
    train(**out)
    folder = tmp_path / "spool"
    folder.mkdir()
    other = Spool(folder, Identity({"lr": 0.5}, "other data"))
    other.write({"progress": {"epoch": 1, "step": 0}, "best": {}})
    Checkpoints(place(out["OUTPUT"]), "crowdlayer").put(folder, "00000001.json")
    before = files_below(tmp_path / "out")
    train(**out)
    assert files_below(tmp_path / "out") == before


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


def test_an_output_that_cannot_be_written_is_known_before_any_training(
    shapes: Path, store: Store, proxy: Meddler, train: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    probe = "out/results/crowdlayer/.probe"
    proxy.spoil(not_taken(store, probe, 403, "AccessDenied"), method="PUT", path=probe)

    with pytest.raises(AccessError, match="the store must allow this"):
        train(TASKS=str(shapes), OUTPUT=f"s3://{store.bucket}/out")

    assert "epoch" not in caplog.text
    assert store.keys() == []


def test_an_output_bucket_that_is_not_there_is_a_wrong_setting(shapes: Path, store: Store, train: Job) -> None:
    with pytest.raises(SettingsError, match="the bucket must exist, 'no-such-bucket' does not"):
        train(TASKS=str(shapes), OUTPUT="s3://no-such-bucket/out")


# --- the working folder ----------------------------------------------------------------------------------------------


def test_a_named_working_folder_keeps_what_was_downloaded(
    shapes: Path, store: Store, proxy: Meddler, tmp_path: Path, train: Job
) -> None:
    tasks, workdir, out = store.put_tree(shapes), tmp_path / "work", str(tmp_path / "out")
    train(TASKS=tasks, WORKDIR=str(workdir), OUTPUT=out)
    assert proxy.count("GET", ".png") == 42
    kept = files_below(workdir)
    assert sum(name.endswith(".png") for name in kept) == 42
    proxy.requests.clear()

    train(TASKS=tasks, WORKDIR=str(workdir), OUTPUT=out, SEED="1")

    assert proxy.count("GET", ".png") == 0
    assert files_below(workdir) == kept
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


def test_a_working_folder_that_is_a_file_is_told_without_a_traceback(shapes: Path, tmp_path: Path, train: Job) -> None:
    (tmp_path / "work").touch()

    for inside in ("work", "work/deeper"):
        with pytest.raises(SettingsError, match=f"WORKDIR: must be a folder, a file is in its place: .*{inside}$"):
            train(TASKS=str(shapes), WORKDIR=str(tmp_path / inside))


# --- check -----------------------------------------------------------------------------------------------------------


def test_a_check_reports_and_leaves_the_bucket_as_it_was(
    shapes: Path, store: Store, check: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tasks = store.put_tree(shapes)
    before = store.keys()

    check(TASKS=tasks)

    assert store.keys() == before
    for told in ("24 tasks", "9 validation and 9 test images", f"{tasks}: an object was written", "resnet18", "cpu"):
        assert told in caplog.text
    assert "epoch 1" not in caplog.text


def test_a_check_keeps_folders_that_were_there(shapes: Path, tmp_path: Path, check: Callable[..., None]) -> None:
    (tmp_path / "out" / "results").mkdir(parents=True)

    check(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"))

    assert sorted((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "results"]


def test_a_check_says_that_a_run_would_do_nothing(
    trained: Path, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(trained.parent)

    check(TASKS="shapes", N_EPOCHS="1")

    assert "already done" in caplog.text


def _a_label_out_of_range(data: Path) -> None:
    answers = json.loads((data / "answers.json").read_text())
    answers["17"]["w3"] = 12
    (data / "answers.json").write_text(json.dumps(answers))


def _no_answers(data: Path) -> None:
    (data / "answers.json").unlink()


def _a_broken_image(data: Path) -> None:
    path = data / "test" / "red" / "square-2.png"
    path.write_bytes(path.read_bytes()[:60])


def _an_unknown_class(data: Path) -> None:
    (data / "train" / "red").rename(data / "train" / "rot")
    (data / "val" / "red").rename(data / "val" / "rot")
    (data / "metadata.json").write_text(json.dumps({"classes": ["blue", "green", "red"]}))


def _no_images(data: Path) -> None:
    shutil.rmtree(data / "train")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (_a_label_out_of_range, "answers.json: task 17, worker w3: label 12 is not below n_classes=3"),
        (_no_answers, "answers.json: is missing, the data set must have {task: {worker: label}}"),
        (_a_broken_image, "test/red/square-2.png: must be an image"),
        (_an_unknown_class, "val/rot/: must be named for one of the classes"),
        (_no_images, "train/: at least one image must belong to an answered task"),
    ],
)
def test_a_check_and_a_run_refuse_the_same_data(
    tmp_path: Path, train: Job, check: Callable[..., None], broken: Callable[[Path], None], told: str
) -> None:
    data = write_shapes(tmp_path / "data")
    broken(data)
    before = files_below(data)

    for do in (check, train):
        with pytest.raises(DataError) as refusal:
            do(TASKS=str(data))
        assert told in str(refusal.value)
    assert files_below(data) == before


def test_n_classes_must_agree_with_the_data(shapes: Path, check: Callable[..., None]) -> None:
    with pytest.raises(SettingsError, match=r"^N_CLASSES: must agree with the data set's 3 classes .*, got 4$"):
        check(TASKS=str(shapes), N_CLASSES="4")


def test_an_empty_folder_and_none_are_told_apart(tmp_path: Path, check: Callable[..., None]) -> None:
    with pytest.raises(DataError, match=r"must hold train/ and answers\.json"):
        check(TASKS=str(tmp_path))
    with pytest.raises(SettingsError, match="there is none"):
        check(TASKS=str(tmp_path / "missing"))
