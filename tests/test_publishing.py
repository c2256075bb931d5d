"""Every file is put with its digest, the results last of all, and nothing of older ones stays beside a newer model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from crowdlayer.deployment.export import Format, export
from crowdlayer.deployment.model_files import Deployed
from crowdlayer.errors import AccessError, SettingsError, StoreError
from crowdlayer.report import publishing
from crowdlayer.report.results import done_before, files_before
from crowdlayer.storage.places import Folder
from tests.conftest import FEW_LAYERS, MODEL, RESULTS, Job, Store, forbid
from tests.servers import Meddler, refused
from tests.trees import bodies

BESIDE = {
    "README.md",
    "args.yaml",
    "confusion.csv",
    "confusion_matrix.png",
    "confusion_matrix_normalized.png",
    "label_studio.json",
    "labels.csv",
    "manifest.sha256",
    "report.html",
    "report.json",
    "results.csv",
    "results.png",
    "train_batch0.jpg",
    "val_batch0_labels.jpg",
    "val_batch0_pred.jpg",
    "workers.csv",
}


def test_everything_is_there_and_has_its_digest(output: Path, beside: Path, results: dict[str, Any]) -> None:
    assert {path.name for path in beside.iterdir()} == BESIDE
    assert {f"results/crowdlayer/{name}" for name in BESIDE} <= results["job"]["files"].keys()
    for name, digest in results["job"]["files"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    subprocess.run(["sha256sum", "--check", "--strict", "results/crowdlayer/manifest.sha256"], cwd=output, check=True)
    listed = {line.split("  ", 1)[1] for line in (beside / "manifest.sha256").read_text().splitlines()}
    assert listed == results["job"]["files"].keys() - {"results/crowdlayer/manifest.sha256"}


def put_by(meddler: Meddler) -> list[str]:
    """The names below the bucket of what was put, in order."""
    return [r.path.partition("?")[0].split("/", 2)[2] for r in meddler.requests if r.method == "PUT"]


def test_the_results_come_last_and_are_not_there_when_they_cannot_be_put(
    shapes: Path, store: Store, meddler: Meddler, train: Job
) -> None:
    out = {"TASKS": str(shapes), "OUTPUT": f"s3://{store.bucket}/out", "CHECKPOINT_EVERY": "0"}
    meddler.spoil(store.not_taken(f"out/{RESULTS}", 403, "AccessDenied"), method="PUT", path=RESULTS)

    with pytest.raises(AccessError, match=RESULTS):
        train(**out)
    (kept,) = Path(tempfile.gettempdir()).glob("crowdlayer-kept-*")
    assert (kept / "results" / MODEL).is_file()
    shutil.rmtree(kept)

    files = [name for name in put_by(meddler) if not name.endswith(("/.probe", RESULTS))]
    assert f"out/{MODEL}" in files
    assert put_by(meddler)[-1] == f"out/{RESULTS}"
    meddler.requests.clear()

    train(**out)  # it was not done, so it is done now

    assert put_by(meddler)[-1] == f"out/{RESULTS}"
    assert sorted(files) == sorted(f"out/{name}" for name in json.loads(store.get(f"out/{RESULTS}"))["job"]["files"])


def test_older_results_are_gone_before_a_new_model_comes(
    shapes: Path, store: Store, meddler: Meddler, train: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    out = {"TASKS": str(shapes), "OUTPUT": f"s3://{store.bucket}/out", "CHECKPOINT_EVERY": "0"}
    train(**out)
    files = json.loads(store.get(f"out/{RESULTS}"))["job"]["files"]
    meddler.spoil(store.not_taken(f"out/{MODEL}", 500, "InternalError"), method="PUT", path=MODEL)

    with pytest.raises(StoreError, match=MODEL):
        train(**out, SEED="1")

    assert set(store.keys()) == {f"out/{name}" for name in files} - {f"out/{MODEL}"}
    (kept,) = Path(tempfile.gettempdir()).glob("crowdlayer-kept-*")
    shutil.rmtree(kept)


def test_results_do_not_come_over_files_that_another_run_of_the_name_has_put_meanwhile(
    shapes: Path, store: Store, meddler: Meddler, train: Job
) -> None:
    """Two jobs of one OUTPUT_NAME that publish at once: they would tell of the other's tables."""
    table, last = "results/crowdlayer/workers.csv", "results/crowdlayer/manifest.sha256"
    meddler.spoil(lambda answer: store.put(f"out/{table}", b"another's"), method="PUT", path=last)
    with pytest.raises(StoreError, match=f"out/{table}: "):
        train(TASKS=str(shapes), OUTPUT=f"s3://{store.bucket}/out", CHECKPOINT_EVERY="0")
    assert f"out/{RESULTS}" not in store.keys()
    for kept in Path(tempfile.gettempdir()).glob("crowdlayer-kept-*"):
        shutil.rmtree(kept)


def test_of_older_results_no_file_stays_that_a_new_run_does_not_have(shapes: Path, tmp_path: Path, train: Job) -> None:
    out = tmp_path / "out"
    train(TASKS=str(shapes), OUTPUT=str(out), EXPORT="torch_export", **FEW_LAYERS)
    (out / "results/crowdlayer/notes.txt").write_text("mine")
    before = bodies(out).keys()
    document = json.loads((out / RESULTS).read_text())
    document["job"]["files"] |= {"../shapes": "", "best_models/crowdlayer/../../x": "", "results/other/a.csv": ""}
    (out / RESULTS).write_text(json.dumps(document))
    for name in ("x", "results/other/a.csv"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()

    train(TASKS=str(shapes), OUTPUT=str(out), SEED="1")

    others = {"x", "results/other/a.csv"}
    assert bodies(out).keys() == before - {"best_models/crowdlayer/model.pt2"} | others


def test_of_older_results_no_file_stays_even_if_a_try_to_replace_them_failed(
    shapes: Path, store: Store, meddler: Meddler, train: Job
) -> None:
    out = {"TASKS": str(shapes), "OUTPUT": f"s3://{store.bucket}/out"}
    train(**out, EXPORT="torch_export", **FEW_LAYERS)
    export, older = "out/best_models/crowdlayer/model.pt2", store.get("out/best_models/crowdlayer/model.pt2")
    meddler.spoil(refused(403, "AccessDenied"), method="DELETE", path="model.pt2")
    with pytest.raises(AccessError, match=r"model\.pt2"):
        train(**out, SEED="1")
    store.put(export, older)  # which the proxy has let through
    (kept,) = Path(tempfile.gettempdir()).glob("crowdlayer-kept-*")
    shutil.rmtree(kept)

    train(**out, SEED="1")

    assert export not in store.keys()


def test_an_export_that_fails_does_not_cost_the_other(
    shapes: Path, tmp_path: Path, train: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(folder: Path, model: Deployed, size: int, formats: Sequence[Format]) -> list[str]:
        if formats == ["onnx"]:
            raise SettingsError("EXPORT: onnx must give the model's probabilities")
        return export(folder, model, size, formats)

    monkeypatch.setattr(publishing, "export", fails)
    train(TASKS=str(shapes), OUTPUT=str(tmp_path / "out"), EXPORT="onnx,torch_export", **FEW_LAYERS)
    assert (tmp_path / "out/best_models/crowdlayer/model.pt2").is_file()
    assert "EXPORT: onnx must give" in caplog.text


def test_a_list_of_older_files_that_cannot_be_does_not_cost_the_run(shapes: Path, tmp_path: Path, train: Job) -> None:
    """Whatever is in the output, and whoever has put it: the run has been trained when it is read."""
    out = tmp_path / "out"
    train(TASKS=str(shapes), OUTPUT=str(out))
    document = json.loads((out / RESULTS).read_text())
    names = ("", "x" * 300, "\0", "\ud800", "a/../../../x")
    document["job"]["files"] |= {f"results/crowdlayer/{name}": "" for name in names}
    (out / RESULTS).write_text(json.dumps(document))
    train(TASKS=str(shapes), OUTPUT=str(out), SEED="1")
    assert json.loads((out / RESULTS).read_text())["job"]["settings"]["seed"] == 1


def test_what_other_runs_have_in_the_same_output_is_not_looked_at(nobody: Path) -> None:
    """It may be closed to this one, and comes and goes."""
    forbid(nobody, 0o777)
    (nobody / "best_models/other").mkdir(parents=True)
    forbid(nobody / "best_models/other")
    assert files_before(Folder(nobody), "crowdlayer") == set()
    assert not done_before(Folder(nobody), "crowdlayer", {}, "")
    forbid(nobody / "best_models/other", 0o777)
