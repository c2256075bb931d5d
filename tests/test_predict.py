"""`entrypoint.py predict`: new images in, a table of calibrated probabilities beside the results."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

import crowdlayer
from crowdlayer import job
from crowdlayer.data.layout import is_image
from crowdlayer.errors import DataError, DeviceMemoryError, SettingsError
from crowdlayer.predict import predict
from crowdlayer.settings import Settings, load_settings
from tests.conftest import FEW_LAYERS, QUICK, Store, run_job, variables
from tests.crowds import write_shapes

COLUMNS = ["image", "label", "confidence", "prob_blue", "prob_green", "prob_red"]


def settings_of(**settings: str) -> Settings:
    with variables(**(QUICK | settings)):
        return load_settings()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a short run, exported too."""
    data, out = write_shapes(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        more = {"N_EPOCHS": "3", "EXPORT": "torch_export"} | FEW_LAYERS
        job.train(settings_of(TASKS=str(data), OUTPUT=str(out), **more))
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_image_gets_a_row_with_its_label_and_probabilities(shapes: Path, trained: Path) -> None:
    """A process, as a platform starts it."""
    done = run_job("predict", TASKS=str(shapes), OUTPUT=str(trained), PREDICT=str(shapes / "test"), BATCH_SIZE="2")

    path = trained / "results" / "crowdlayer" / "predictions.csv"
    assert (done.code, done.stdout) == (0, f"{path}\n"), done.stderr
    found = rows(path)
    assert list(found[0]) == COLUMNS
    assert [row["image"] for row in found] == sorted(
        str(p.relative_to(shapes / "test")) for p in shapes.glob("test/*/*")
    )
    for row in found:
        probabilities = [float(row[name]) for name in COLUMNS[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert float(row["confidence"]) == max(probabilities)
        assert row["label"] == COLUMNS[3 + int(np.argmax(probabilities))].removeprefix("prob_")
    right = [row["label"] == row["image"].split("/")[0] for row in found]
    accuracy = json.loads((trained / "results" / "crowdlayer.json").read_text())["test_accuracy"]
    assert 100 * np.mean(right) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "name", ["x.PNG", "a/x.jpg", ".x.png", "a/.b/x.png", "__MACOSX/x.png", "lost+found/x.png", "x.txt"]
)
def test_what_is_hidden_or_the_systems_own_is_no_image(name: str) -> None:
    assert is_image(name) == (name in ("x.PNG", "a/x.jpg"))


def test_the_pictures_of_runs_are_not_labelled(shapes: Path, trained: Path, tmp_path: Path) -> None:
    for folder in ("results", "best_models"):
        shutil.copytree(trained / folder, tmp_path / folder)
    shutil.copytree(shapes / "test", tmp_path / "results of the spring")
    location = predict(settings_of(TASKS=str(tmp_path), PREDICT=str(tmp_path)))
    named = {row["image"].split("/")[0] for row in rows(Path(location))}
    assert named == {"results of the spring"}
    assert list(tmp_path.glob("results/*/*.png"))
    for spelt, below in ((f"{tmp_path}/../{tmp_path.name}", ""), (str(tmp_path.parent), f"{tmp_path.name}/")):
        settings = settings_of(TASKS=str(tmp_path), OUTPUT=str(tmp_path), PREDICT=spelt)
        found = [row["image"] for row in rows(Path(predict(settings)))]
        assert found
        assert not [name for name in found if name.startswith(f"{below}results/")]


def test_of_several_nodes_the_first_labels_all(shapes: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained / "results" / "crowdlayer" / "predictions.csv"
    path.unlink(missing_ok=True)
    settings = settings_of(TASKS=str(shapes), OUTPUT=str(trained), PREDICT=str(shapes / "test"))
    for name, value in {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert predict(settings) == ""
    assert not path.exists()
    monkeypatch.setenv("NODE_RANK", "0")
    assert predict(settings) == str(path)
    assert len(rows(path)) == len(list(shapes.glob("test/*/*")))


def test_a_model_from_a_bucket_labels_an_archive_and_parquet_says_the_same(
    shapes: Path, trained: Path, store: Store, tmp_path: Path
) -> None:
    output = store.put_tree(trained, "out")
    with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
        for path in shapes.glob("test/*/*"):
            archive.write(path, path.relative_to(shapes / "test"))
        archive.writestr("readme.txt", "not an image")
    store.put("new.zip", (tmp_path / "new.zip").read_bytes())
    at = {"TASKS": str(shapes), "PREDICT": f"s3://{store.bucket}/new.zip", "PREDICT_FORMAT": "parquet"}

    location = predict(settings_of(OUTPUT=output, WORKDIR=str(tmp_path / "work"), **at))

    assert location == f"{output}/results/crowdlayer/predictions.parquet"
    (tmp_path / "predictions.parquet").write_bytes(store.get("out/results/crowdlayer/predictions.parquet"))
    table: list[dict[str, Any]] = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    predict(settings_of(TASKS=str(shapes), OUTPUT=str(trained), PREDICT=str(shapes / "test")))
    for one, other in zip(table, rows(trained / "results" / "crowdlayer" / "predictions.csv"), strict=True):
        assert (one["image"], one["label"]) == (other["image"], other["label"])
        np.testing.assert_allclose([one[c] for c in COLUMNS[2:]], [float(other[c]) for c in COLUMNS[2:]], atol=1e-6)


@pytest.mark.parametrize("predict_format", ["csv", "parquet"])
def test_an_image_that_cannot_be_read_has_an_empty_row_and_a_warning(
    shapes: Path,
    trained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    predict_format: str,
) -> None:
    (tmp_path / "a.png").write_bytes((shapes / "test" / "red" / "square-2.png").read_bytes())
    (tmp_path / "b.png").write_bytes(b"torn")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"torn")
    (tmp_path / ".hidden.png").write_bytes(b"not looked at")
    at = {"TASKS": str(shapes), "OUTPUT": str(trained), "PREDICT": str(tmp_path), "PREDICT_FORMAT": predict_format}

    location = predict(settings_of(**at))

    found = rows(Path(location)) if predict_format == "csv" else pyarrow.parquet.read_table(location).to_pylist()
    assert [row["image"] for row in found] == ["a.png", "b.png", r"caf\xe9.png"]
    assert found[0]["label"]
    assert not any(found[1][column] for column in COLUMNS[1:])
    assert "b.png: must be an image" in caplog.text


def test_what_cannot_be_labelled_has_a_runs_exit_codes(shapes: Path, trained: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, **settings: str) -> None:
        at = {"TASKS": str(shapes), "OUTPUT": str(trained), "PREDICT": str(shapes / "test")} | settings
        with pytest.raises(kind, match=match):
            predict(settings_of(**at))

    empty, torn = tmp_path / "empty", tmp_path / "torn"
    empty.mkdir()
    torn.mkdir()
    (torn / "a.jpg").write_bytes(b"torn")
    refused(SettingsError, "CROWDLAYER_PREDICT: must be set", PREDICT="")
    refused(
        SettingsError, "OUTPUT: must not be in a folder of WORKDIR", WORKDIR=str(tmp_path), OUTPUT=f"{tmp_path}/predict"
    )
    refused(SettingsError, "PREDICT: must be a folder", PREDICT=str(tmp_path / "nowhere"))
    refused(DataError, "must hold images", PREDICT=str(empty))
    refused(DataError, "at least one image must be readable, of 1 none is", PREDICT=str(torn))
    refused(SettingsError, "OUTPUT: must have the model of a finished run named OUTPUT_NAME=other", OUTPUT_NAME="other")


def test_an_output_that_cannot_be_written_is_told_before_anything_is_labelled(
    shapes: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "results/crowdlayer")
    (out / "results/crowdlayer").write_text("a file in the place of the folder")
    with pytest.raises(SettingsError, match="must be a folder, a file is in its place"):
        predict(settings_of(TASKS=str(shapes), OUTPUT=str(out), PREDICT=str(shapes / "test")))
    assert "labelled" not in caplog.text


def test_a_run_that_is_named_model_labels_too(shapes: Path, trained: Path, tmp_path: Path) -> None:
    for folder in ("results", "best_models"):
        for path in (trained / folder).glob("crowdlayer*"):
            copied = tmp_path / folder / path.name.replace("crowdlayer", "model")
            copied.parent.mkdir(exist_ok=True)
            shutil.copytree(path, copied) if path.is_dir() else shutil.copy(path, copied)
    at = {"TASKS": str(shapes), "OUTPUT": str(tmp_path), "OUTPUT_NAME": "model", "PREDICT": str(shapes / "test")}
    assert predict(settings_of(**at)) == f"{tmp_path}/results/model/predictions.csv"


def test_too_little_memory_names_the_model_and_what_to_lower(
    shapes: Path, trained: Path, tmp_path: Path, cgroup: Path
) -> None:
    """A container that has 500 MB left, of which the first convolution wants more than twice as many."""
    large = Path(shutil.copytree(trained, tmp_path / "out"))
    description = large / "best_models" / "crowdlayer" / "model.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"image_size": 1500}))
    (cgroup / "memory.max").write_text(str(2**30))
    (cgroup / "memory.current").write_text(str(2**29))
    settings = settings_of(TASKS=str(shapes), OUTPUT=str(large), PREDICT=str(shapes / "test"), BATCH_SIZE="8")
    before, said = (
        resource.getrlimit(resource.RLIMIT_DATA),
        "the model's squeezenet1_1 at 1500 pixels and BATCH_SIZE=8: lower",
    )
    try:
        with pytest.raises(DeviceMemoryError, match=f"out of memory with {said} BATCH_SIZE; .* were asked for"):
            predict(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_load_takes_the_location_that_the_job_printed(shapes: Path, trained: Path, store: Store) -> None:
    output = store.put_tree(trained, "out")
    images = sorted(shapes.glob("test/*/*"))
    here = crowdlayer.load(trained / "results" / "crowdlayer.json").predict_proba(images)
    np.testing.assert_array_equal(crowdlayer.load(f"{output}/results/crowdlayer.json").predict_proba(images), here)
    with pytest.raises(DataError, match=r"model\.json is missing"):
        crowdlayer.load(f"{output}/results/other.json")


def test_the_files_of_the_model_are_in_the_results_with_their_digests(trained: Path) -> None:
    files = json.loads((trained / "results" / "crowdlayer.json").read_text())["job"]["files"]
    wanted = {f"best_models/crowdlayer/model.{ending}" for ending in ("json", "safetensors", "pt2")}
    assert wanted <= files.keys()
    assert all((trained / name).is_file() for name in files)
