"""What the results hold, as those who read them rely on it."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import torchvision
from torch import Tensor

import crowdlayer
from crowdlayer import job
from crowdlayer.data.images import Rows
from crowdlayer.errors import SettingsError, StoreError
from crowdlayer.learning.trainer import Trainer
from crowdlayer.report.results import done_before, dumped, headline
from crowdlayer.settings import Settings, load_settings
from crowdlayer.storage.places import Folder
from tests.conftest import QUICK, variables
from tests.crowds import write_digits, write_shapes

SEED_KEYS = {"train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_ece"}
TOP_K_KEYS = {f"{split}_{mean}_top{k}" for split in ("val", "test") for mean in ("micro", "macro") for k in (2, 5)}
OUR_KEYS = {
    "best_epoch",
    "class_names",
    "n_tasks",
    "n_workers",
    "n_answers",
    "n_held_out",
    "left_out",
    "train_accuracy",
    "majority_vote_accuracy",
    "answer_accuracy",
    "majority_vote_agreement",
    "n_label_issues",
    "temperature",
    "temperature_fitted_on",
    "posterior_temperature",
    "calibration",
    "workers",
    "job",
}


def run(**settings: str) -> Settings:
    """Train in this process; the settings used."""
    with variables(**(QUICK | settings)):
        loaded = load_settings()
        job.train(loaded)
    return loaded


def parsed(path: Path) -> dict[str, Any]:
    """The JSON, which must not have NaN or Infinity."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} in {path}")

    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings, dict[str, Any]]:
    """The output of a run of three epochs on shapes, its settings and its results."""
    data, out = write_shapes(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    answers = json.loads((data / "answers.json").read_text())
    answers["999"] = {"0": 1}  # no such image
    del answers["7"]
    (data / "answers.json").write_text(json.dumps(answers))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        settings = run(TASKS=str(data), OUTPUT=str(out), N_EPOCHS="3", SEED="5")
    return out, settings, parsed(out / "results" / "crowdlayer.json")


Finished = tuple[Path, Settings, dict[str, Any]]


def test_the_results_have_every_key_of_the_contract(finished: Finished) -> None:
    _, _, results = finished

    assert results.keys() >= SEED_KEYS | OUR_KEYS
    assert results["job"].keys() >= {
        "version",
        "settings",
        "seed",
        "devices",
        "libraries",
        "data_digest",
        "files",
        "seconds",
    }


def test_a_list_has_an_entry_per_epoch_and_percent_are_percent(finished: Finished) -> None:
    _, _, results = finished

    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert len(results[name]) == 3
        assert all(isinstance(value, float) and math.isfinite(value) for value in results[name])
    percents = [*results["val_accuracy"], *(value for name, value in results.items() if name.endswith("_accuracy"))]
    assert all(0 <= value <= 100 for value in percents if isinstance(value, float))
    assert results["majority_vote_accuracy"] > 60  # three of four workers are always right
    assert 0 <= results["test_ece"] <= 1


def test_the_best_epoch_is_the_one_with_the_least_validation_loss(finished: Finished) -> None:
    _, _, results = finished

    assert results["best_epoch"] == 1 + results["val_loss"].index(min(results["val_loss"]))


def test_results_are_json_for_people_and_other_programs() -> None:
    assert "".join(dumped({"class_names": ["Möwe"], "best_epoch": 1})) == (
        '{\n   "class_names": [\n      "Möwe"\n   ],\n   "best_epoch": 1\n}\n'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(dumped({"test_loss": math.nan}))


def test_a_run_that_did_not_collapse_says_so(finished: Finished) -> None:
    assert (finished[2]["collapsed"], finished[2]["collapsed_since"]) == (False, None)


def test_the_headline_has_the_figures_that_there_are() -> None:
    results = {"best_epoch": 2, "train_loss": [1.0, 2.0, 3.0], "test_accuracy": 91.25, "train_accuracy": None}
    found = results | {"majority_vote_accuracy": 80.0}
    assert headline(found) == "best epoch 2 of 3: test accuracy 91.2 %, majority vote right 80.0 %"
    assert headline(found | {"test_accuracy": None, "majority_vote_accuracy": None}) == "best epoch 2 of 3"


def test_the_counts_are_those_of_the_data(finished: Finished) -> None:
    _, settings, results = finished
    answers = json.loads((Path(settings.tasks) / "answers.json").read_text())
    used = {task: votes for task, votes in answers.items() if task != "999"}

    assert results["class_names"] == ["blue", "green", "red"]
    assert (results["n_tasks"], results["n_workers"]) == (23, 4)
    assert results["n_answers"] == sum(map(len, used.values()))
    assert results["n_held_out"] == 0
    assert results["left_out"] == {
        "images_without_answers": 1,
        "answered_tasks_without_image": 1,
        "tasks_removed": 0,
        "broken_images": 0,
    }


def test_the_job_says_what_it_was_made_of(finished: Finished) -> None:
    _, settings, results = finished
    made = results["job"]

    assert made["version"] == crowdlayer.__version__
    assert made["settings"] == settings.model_dump(mode="json")
    assert made["seed"] == 5
    assert made["devices"] == ["cpu"]
    assert {"python", "torch", "torchvision", "accelerate", "boto3"} <= made["libraries"].keys()
    assert made["seconds"].keys() >= {"sync", "read", "decode", "build", "train", "evaluate", "publish"}
    assert all(seconds >= 0 for seconds in made["seconds"].values())
    assert len(made["data_digest"]) == 64


def test_the_digests_are_those_of_the_files(finished: Finished) -> None:
    out, _, results = finished
    files = results["job"]["files"]

    assert files.keys() >= {
        "best_models/crowdlayer.pth",
        "results/crowdlayer/labels.csv",
        "results/crowdlayer/workers.csv",
        "results/crowdlayer/confusion.csv",
    }
    for name, digest in files.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_the_model_is_read_with_weights_only_and_fits_the_network(finished: Finished) -> None:
    out, _, results = finished

    saved = torch.load(out / "best_models" / "crowdlayer.pth", weights_only=True)

    assert saved.keys() == {"confusion", "classifier"}
    assert saved["confusion"].shape == (results["n_workers"], 3, 3)
    assert saved["confusion"].dtype == torch.float32
    assert not saved["confusion"].requires_grad
    network = torchvision.models.get_model(QUICK["MODEL"], num_classes=3)
    assert network.load_state_dict(saved["classifier"]).missing_keys == []
    assert all(tensor.device.type == "cpu" for tensor in saved["classifier"].values())


def test_the_tables_have_a_row_per_task_and_per_worker(finished: Finished) -> None:
    out, _, results = finished
    labels, workers = (rows(out / "results" / "crowdlayer" / f"{name}.csv") for name in ("labels", "workers"))

    assert {row["task"] for row in labels} == {str(task) for task in range(24) if task != 7}
    assert {row["consensus_label"] for row in labels} <= set(results["class_names"])
    assert all(0 <= float(row["consensus_quality_score"]) <= 1 for row in labels)
    assert sorted((row["worker"], row["confusion_row"]) for row in workers) == [(str(i), str(i)) for i in range(4)]
    assert sum(int(row["num_annotations"]) for row in labels) == results["n_answers"]
    assert sum(int(row["num_examples_labeled"]) for row in workers) == results["n_answers"]


def test_pandas_reads_the_tables_without_a_word(finished: Finished) -> None:
    out, _, results = finished
    labels, workers, confusion = (
        pandas.read_csv(out / "results" / "crowdlayer" / f"{name}.csv") for name in ("labels", "workers", "confusion")
    )

    assert labels.columns[:6].tolist() == [
        "task",
        "consensus_label",
        "consensus_quality_score",
        "majority_label",
        "entropy",
        "is_label_issue",
    ]
    assert labels.is_label_issue.dtype == bool
    assert labels["rank"].tolist() == list(range(1, len(labels) + 1))
    posterior = labels[[f"posterior_{name}" for name in results["class_names"]]]
    assert posterior.sum(axis=1).tolist() == pytest.approx([1] * len(labels), abs=1e-5)
    assert posterior.max(axis=1).tolist() == pytest.approx(labels.consensus_quality_score.tolist())
    assert workers.columns[:8].tolist() == [
        "worker",
        "num_examples_labeled",
        "annotator_quality",
        "annotator_quality_low",
        "annotator_quality_high",
        "agreement_with_consensus",
        "worst_class",
        "spammer_score",
    ]
    assert workers.annotator_quality.is_monotonic_increasing
    assert (workers.annotator_quality_low <= workers.annotator_quality).all()
    assert workers.worker.tolist()[0] == 3  # the spammer
    assert workers.spammer_score.idxmax() == 0
    assert confusion.columns.tolist() == ["worker", "true_label", "observed_label", "prob", "count"]
    assert confusion.groupby(["worker", "true_label"])["prob"].sum().tolist() == pytest.approx([1] * 12, abs=1e-5)
    assert confusion["count"].sum() == pytest.approx(results["n_answers"], abs=1e-3)


def test_the_figures_of_the_workers_are_in_the_results_too(finished: Finished) -> None:
    out, _, results = finished
    table = pandas.read_csv(out / "results" / "crowdlayer" / "workers.csv", dtype={"worker": str})

    assert results["workers"] == table.to_dict(orient="list")


def test_the_temperature_is_there_and_the_seeds_figures_are_those_without_it(finished: Finished) -> None:
    _, _, results = finished
    before, after = (results["calibration"]["test"][when] for when in ("before", "after"))

    assert results["temperature_fitted_on"] == "val"
    assert 0.05 <= results["temperature"] <= 20
    assert results["posterior_temperature"] >= results["temperature"]
    assert before["ece"] == results["test_ece"]
    assert before["log_loss"] == results["test_loss"]
    assert results["calibration"]["val"]["after"]["log_loss"] <= results["calibration"]["val"]["before"]["log_loss"]
    assert after.keys() == {"ece", "brier", "log_loss"}


@pytest.mark.parametrize(("names", "expected"), [(7, set[str]()), (8, TOP_K_KEYS)])
def test_top_k_figures_begin_with_eight_classes(shapes: Path, tmp_path: Path, names: int, expected: set[str]) -> None:
    """Five of the eight have no image, which costs a mean over classes nothing."""
    classes = ["blue", "green", "red", *(f"none-{i}" for i in range(names - 3))]

    run(TASKS=str(shapes), OUTPUT=str(tmp_path), CLASSES=",".join(classes), N_EPOCHS="1")

    results = parsed(tmp_path / "results" / "crowdlayer.json")
    assert {name for name in results if "_top" in name} == expected
    assert all(0 <= results[name] <= 100 for name in expected)
    for split in ("val", "test") if expected else ():
        for mean in ("micro", "macro"):
            assert results[f"{split}_{mean}_top2"] <= results[f"{split}_{mean}_top5"]


def test_what_does_not_exist_is_null(tmp_path: Path) -> None:
    """Ten classes, no val/, no test/, no class folders: nothing is known but answers."""
    digits, data = write_digits(tmp_path / "digits", n_train=60, n_val=1, n_test=1), tmp_path / "data"
    (data / "train").mkdir(parents=True)
    for image in (digits / "train").rglob("*.png"):
        image.rename(data / "train" / image.name)
    (digits / "answers.json").rename(data / "answers.json")

    run(TASKS=str(data), N_EPOCHS="1", OUTPUT_NAME="ünï")

    results = parsed(data / "results" / "ünï.json")
    assert results.keys() >= SEED_KEYS | TOP_K_KEYS | OUR_KEYS
    unknown = TOP_K_KEYS | {"test_loss", "test_accuracy", "test_ece", "train_accuracy", "majority_vote_accuracy"}
    assert {name for name in unknown | {"answer_accuracy"} if results[name] is not None} == set()
    assert results["val_accuracy"] == [None]
    assert results["calibration"] == {"val": None, "test": None}
    assert results["temperature_fitted_on"] == "held-out answers"
    assert results["class_names"] == [str(i) for i in range(10)]


def test_one_image_to_validate_and_one_to_test_are_enough(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", n_train=9, n_val=1, n_test=1)

    run(TASKS=str(data), N_EPOCHS="1", LR="0.001")

    results = parsed(data / "results" / "crowdlayer.json")
    assert results["test_accuracy"] in (0, 100)
    assert results["val_accuracy"][0] in (0, 100)
    assert results["class_names"] == ["blue", "green", "red"]


def asked(finished: Finished, out: Path, **differing: Any) -> bool:
    """Whether the run, but for what differs, is held to be done."""
    _, settings, results = finished
    digest = differing.pop("data_digest", results["job"]["data_digest"])
    return done_before(Folder(out), "crowdlayer", settings.model_dump(mode="json") | differing, digest)


def test_a_run_is_done_where_its_results_and_all_their_files_are(finished: Finished, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    assert asked(finished, out)
    assert asked(finished, out, verbose=False)
    assert not asked(finished, out, lr=0.7)
    assert not asked(finished, out, data_digest="0" * 64)
    (out / "results/crowdlayer/labels.csv").unlink()
    assert not asked(finished, out)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"job": 7}', '{"job": {"settings": {}}}', '{"train_loss": [1.0]}']
)
def test_results_of_others_are_no_run_of_ours(finished: Finished, tmp_path: Path, text: str | None) -> None:
    (tmp_path / "results").mkdir()
    if text is not None:
        (tmp_path / "results/crowdlayer.json").write_text(text)
    assert not asked(finished, tmp_path)


def test_no_older_results_stay_beside_a_newer_model(finished: Finished, tmp_path: Path) -> None:
    """A model that cannot be put ends the run when the older results are gone already."""
    out, data = Path(shutil.copytree(finished[0], tmp_path / "out")), write_shapes(tmp_path / "data")
    (out / "best_models/crowdlayer.pth").unlink()
    (out / "best_models/crowdlayer.pth").mkdir()
    with pytest.raises(StoreError, match=r"best_models/crowdlayer\.pth: Is a directory"):
        run(TASKS=str(data), OUTPUT=str(out), WORKDIR=str(tmp_path / "work"))
    assert not (out / "results/crowdlayer.json").exists()
    (kept,) = (tmp_path / "work").glob("crowdlayer-kept-*/results/results/crowdlayer.json")
    assert parsed(kept)["job"]["files"]


def test_a_test_image_that_overflows_is_said_and_no_figure_is_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in fp16 may that is unlike all others."""
    predict = Trainer.predict

    def overflowing(trainer: Trainer, images: Rows) -> Tensor:
        logits = predict(trainer, images).clone()
        if len(images) == 7:
            logits[3, 0] = math.inf
        return logits

    monkeypatch.setattr(Trainer, "predict", overflowing)
    data, out = write_shapes(tmp_path / "data", n_test=7), tmp_path / "out"
    with pytest.raises(SettingsError, match=r"^MIXED_PRECISION: .* for 1 of test they are not in precision no"):
        run(TASKS=str(data), OUTPUT=str(out), WORKDIR=str(tmp_path / "work"))
    assert not (out / "results/crowdlayer.json").exists()
