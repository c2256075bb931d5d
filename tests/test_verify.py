"""What was published is what was written, or the one who asks is told which file is not."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.errors import DataError, SettingsError
from crowdlayer.storage.files import file_digest
from crowdlayer.verify import main, verify
from tests.conftest import ROOT, Store
from tests.servers import free_port


def write_run(root: Path, name: str = "run") -> Path:
    """The files of a run with their digests, as a run leaves them."""
    files = {f"best_models/{name}.pth": b"weights", f"results/{name}/labels.csv": b"task,label\n"}
    for file, body in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(body)
    results = {"train_loss": [0.5], "job": {"files": {file: file_digest(root / file) for file in files}}}
    (root / f"results/{name}.json").write_text(json.dumps(results))
    return root


@pytest.mark.parametrize("remote", [False, True])
def test_files_that_are_as_they_were_pass(remote: bool, tmp_path: Path, store: Store) -> None:
    write_run(write_run(tmp_path, "other"))
    assert verify(store.put_tree(tmp_path) if remote else str(tmp_path)) == 4


@pytest.mark.parametrize("remote", [False, True])
def test_of_what_the_job_prints_one_runs_files_are_read(remote: bool, tmp_path: Path, store: Store) -> None:
    write_run(write_run(tmp_path, "other"))
    (tmp_path / "best_models/other.pth").write_bytes(b"Weights")
    output = store.put_tree(tmp_path) if remote else str(tmp_path)
    assert verify(f"{output}/results/run.json") == 2


@pytest.mark.parametrize("remote", [False, True])
def test_every_file_that_is_not_as_it_was_is_named(remote: bool, tmp_path: Path, store: Store) -> None:
    write_run(write_run(tmp_path, "other"))
    (tmp_path / "best_models/run.pth").write_bytes(b"Weights")
    (tmp_path / "results/other/labels.csv").unlink()
    with pytest.raises(DataError) as told:
        verify(store.put_tree(tmp_path) if remote else str(tmp_path))
    assert "best_models/run.pth: must have the SHA-256 " in str(told.value)
    assert "results/other/labels.csv: must be there, is missing" in str(told.value)
    assert str(told.value).count(";") == 1


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, '{"job": {"files": [1]}}'])
def test_results_that_are_none_are_named(content: str, tmp_path: Path) -> None:
    (write_run(tmp_path) / "results/run.json").write_text(content)
    with pytest.raises(DataError, match=r"results/run\.json: must be the results of a run"):
        verify(str(tmp_path))


@pytest.mark.parametrize("remote", [False, True])
def test_results_of_peerannots_beside_ours_are_left_out(
    remote: bool, tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the same folder for them."""
    write_run(tmp_path)
    (tmp_path / "results/peerannot.json").write_text('{"train_loss": [0.7, NaN], "val_accuracy": [50.0]}')
    output = store.put_tree(tmp_path) if remote else str(tmp_path)
    assert verify(output) == 2
    assert "results/peerannot.json: left out, it says nothing of a job" in caplog.text
    with pytest.raises(DataError, match=r"results/peerannot\.json: must be the results of a run"):
        verify(f"{output}/results/peerannot.json")


@pytest.mark.parametrize("location", ["{}", "{}/nothing", "{}/results/run.json", "https://host/x", "s3://", ""])
def test_a_place_without_results_is_a_wrong_argument(location: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        verify(location.format(tmp_path))


def spoil(root: Path) -> None:
    (root / "best_models/run.pth").write_bytes(b"Weights")


@pytest.mark.parametrize(("change", "code"), [(lambda root: None, 0), (spoil, 65)])
def test_the_exit_code_is_the_contracts(change: Callable[[Path], None], code: int, tmp_path: Path) -> None:
    change(write_run(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "crowdlayer.verify", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert ("all 2 files are what the runs wrote" in done.stderr) == (code == 0)


def test_a_disk_that_cannot_hold_a_file_of_the_run_has_a_code_too(tmp_path: Path, store: Store) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crowdlayer.verify", store.put_tree(write_run(tmp_path))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4)),
    )
    assert (done.returncode, done.stdout) == (74, ""), done.stderr
    assert "\ncrowdlayer: best_models/run.pth in TMPDIR: File too large\n" in done.stderr


def test_a_store_that_fails_and_one_that_refuses_and_a_wrong_call_have_codes_too(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 78
    assert capsys.readouterr().err.startswith("crowdlayer: usage: python -m crowdlayer.verify RESULTS")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert main([f"s3://{store.bucket}"]) == 77
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert main([f"s3://{store.bucket}"]) == 74
