"""What a run takes, and what it refuses before it trains."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.errors import AccessError, DataError, SettingsError
from crowdlayer.inputs import check_possible
from crowdlayer.settings import TrainingSettings
from tests.conftest import Job, Store, forbid, results_in
from tests.crowds import write_shapes
from tests.servers import Meddler
from tests.trees import bodies

# --- the data set ----------------------------------------------------------------------------------------------------


def test_without_val_no_true_label_chooses_the_epoch(tmp_path: Path, train: Job) -> None:
    data = write_shapes(tmp_path / "data")
    shutil.rmtree(data / "val")

    train(TASKS=str(data), N_EPOCHS="2", VAL_FRACTION="0.25")

    results = results_in(data)
    assert results["n_held_out"] == 6
    assert results["n_tasks"] == 24
    assert results["val_accuracy"] == [None, None]
    assert all(isinstance(loss, float) for loss in results["val_loss"])
    assert results["test_accuracy"] is not None


def test_without_test_the_figures_of_test_are_null(tmp_path: Path, train: Job) -> None:
    data = write_shapes(tmp_path / "data")
    shutil.rmtree(data / "test")

    train(TASKS=str(data))

    results = results_in(data)
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

    results = results_in(data)
    assert results["class_names"] == ["0", "1", "2"]
    assert results["train_accuracy"] is None
    assert results["majority_vote_accuracy"] is None
    assert 0 <= results["majority_vote_agreement"] <= 100


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
    before = bodies(data)

    for do in (check, train):
        with pytest.raises(DataError) as refusal:
            do(TASKS=str(data))
        assert told in str(refusal.value)
    assert bodies(data) == before


def test_n_classes_must_agree_with_the_data(shapes: Path, check: Callable[..., None]) -> None:
    with pytest.raises(SettingsError, match=r"^N_CLASSES: must agree with the data set's 3 classes .*, got 4$"):
        check(TASKS=str(shapes), N_CLASSES="4")


def test_an_empty_folder_and_none_are_told_apart(tmp_path: Path, check: Callable[..., None]) -> None:
    with pytest.raises(DataError, match=r"must hold train/ and answers\.json"):
        check(TASKS=str(tmp_path))
    with pytest.raises(SettingsError, match="there is none"):
        check(TASKS=str(tmp_path / "missing"))


# --- files that settings name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_the_answers_may_be_elsewhere(tmp_path: Path, store: Store, train: Job, where: str) -> None:
    data, out = write_shapes(tmp_path / "data"), tmp_path / "out"
    answers = (data / "answers.json").rename(tmp_path / "other.json")
    store.put("votes/other.json", answers.read_bytes())
    at = {"folder": str(answers), "bucket": f"s3://{store.bucket}/votes/other.json"}[where]

    train(TASKS=str(data), ANSWERS=at, OUTPUT=str(out))

    assert results_in(out)["n_tasks"] == 24
    assert results_in(out)["job"]["settings"]["answers"] == at


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("PRETRAINED", "best_models/crowdlayer.pth"),
        ("PRETRAINED", "best_models/crowdlayer/model.safetensors"),
        ("ANSWERS", "results/crowdlayer/label_studio.json"),
        ("PATH_REMOVE", "results/crowdlayer.json"),
    ],
)
def test_what_the_run_itself_puts_is_not_read(
    setting: str, name: str, shapes: Path, tmp_path: Path, train: Job, check: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start would read the first one's: it would be another run, and refuse the checkpoint."""
    (path := tmp_path / "out" / name).parent.mkdir(parents=True)
    path.touch()
    monkeypatch.chdir(tmp_path)
    for output in (tmp_path / "out", "out", f"{tmp_path}/out/../out"):
        for job in (train, check):
            with pytest.raises(SettingsError, match=f"^{setting}: must not be a file that this run puts itself, is "):
                job(TASKS=str(shapes), OUTPUT=str(output), **{setting: str(path)})


def test_the_model_of_another_name_may_be_trained_on(shapes: Path, tmp_path: Path, train: Job) -> None:
    train(TASKS=str(shapes), OUTPUT=str(tmp_path))
    train(
        TASKS=str(shapes), OUTPUT=str(tmp_path), OUTPUT_NAME="on", PRETRAINED=f"{tmp_path}/best_models/crowdlayer.pth"
    )


def test_answers_that_are_not_there_are_a_wrong_setting(shapes: Path, store: Store, train: Job) -> None:
    for at in ("/nowhere/answers.json", f"s3://{store.bucket}/nowhere.json"):
        with pytest.raises(SettingsError, match=f"^ANSWERS: must be .* at {at}$"):
            train(TASKS=str(shapes), ANSWERS=at)


def test_peerannots_file_of_tasks_leaves_them_out(shapes: Path, tmp_path: Path, train: Job) -> None:
    (tmp_path / "remove.txt").write_text("-1 5\n-1 17\n")

    train(TASKS=str(shapes), PATH_REMOVE=str(tmp_path / "remove.txt"), OUTPUT=str(tmp_path / "out"))

    results = results_in(tmp_path / "out")
    assert (results["n_tasks"], results["left_out"]["tasks_removed"]) == (22, 2)
    labels = (tmp_path / "out" / "results" / "crowdlayer" / "labels.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in labels} == {str(task) for task in range(24)} - {"5", "17"}


# --- the output ------------------------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_known_before_any_training(
    shapes: Path, store: Store, meddler: Meddler, train: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    probe = "out/results/crowdlayer/.probe"
    meddler.spoil(store.not_taken(probe, 403, "AccessDenied"), method="PUT", path=probe)

    with pytest.raises(AccessError, match="the store must allow this"):
        train(TASKS=str(shapes), OUTPUT=f"s3://{store.bucket}/out")

    assert "epoch" not in caplog.text
    assert store.keys() == []


@pytest.mark.parametrize("output", ["s3://bucket/birds/train/x", "s3://bucket//birds/train/x"])
def test_an_output_among_the_images_is_refused_however_it_is_spelt(output: str, train: Job, check: Job) -> None:
    for job in (train, check):
        with pytest.raises(SettingsError, match=r"^OUTPUT: must not be among the images of s3://bucket/birds, is "):
            job(TASKS="s3://bucket/birds", OUTPUT=output)


def test_all_that_is_wrong_with_the_settings_is_said_at_once(tmp_path: Path, train: Job) -> None:
    """Places and what no data set can make work: not one per start of a container."""
    settings = {
        "MODEL": "vgg11",
        "IMG_SIZE": "32",
        "SMALL_IMAGES": "true",
        "PRETRAINED": str(tmp_path / "best_models/crowdlayer.pth"),
    }
    with pytest.raises(SettingsError) as refused:
        train(TASKS=str(tmp_path / "nowhere"), OUTPUT=str(tmp_path), **settings)
    assert "TASKS: must be a folder" in str(refused.value)
    assert "PRETRAINED: must not be a file that this run puts itself" in str(refused.value)
    assert "SMALL_IMAGES: true needs a resnet-like MODEL" in str(refused.value)


def test_an_output_bucket_that_is_not_there_is_a_wrong_setting(shapes: Path, store: Store, train: Job) -> None:
    with pytest.raises(SettingsError, match="the bucket must exist, 'no-such-bucket' does not"):
        train(TASKS=str(shapes), OUTPUT="s3://no-such-bucket/out")


@pytest.mark.parametrize("name", ["closed/x", "n" * 300])
def test_a_workdir_that_cannot_be_looked_at_is_no_fault_of_the_settings_check(nobody: Path, name: str) -> None:
    """Whoever makes it says why it cannot be there."""
    forbid(nobody, 0o777)
    (nobody / "closed").mkdir(mode=0)
    check_possible(TrainingSettings(img_size=32), (), str(nobody / name))
