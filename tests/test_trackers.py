"""Figures reach the trackers, and a tracker that fails, hangs or is away never hurts a run."""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from crowdlayer import job
from crowdlayer.errors import DataError, InterruptedRunError
from crowdlayer.report import trackers
from crowdlayer.report.trackers import Textfile, Trackers, wanted
from crowdlayer.settings import load_settings
from tests.conftest import QUICK, run_job

CONFIG: dict[str, Any] = {"n_epochs": 2, "lr": 0.1, "classes": None, "milestones": [50]}
pytestmark = pytest.mark.usefixtures("process_state")


@pytest.fixture(scope="module")
def process_state() -> PartialState:
    """Accelerate's trackers ask it whether this process is the first."""
    return PartialState(cpu=True)


def track(made: dict[str, Callable[[], GeneralTracker]]) -> None:
    """A run of two epochs."""
    with Trackers(made, CONFIG) as told:
        told.log({"train/loss": 1.5}, 1)
        told.log({"train/loss": 0.5}, 2)
        told.log({"test/accuracy": 80.0})


def test_tensorboard_shows_a_curve_per_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(wanted("my run", str(tmp_path), None))
    events = EventAccumulator(str(tmp_path / "my run")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.5), (2, 0.5)]


def test_prometheus_reads_the_newest_figures(tmp_path: Path) -> None:
    path = tmp_path / "textfile" / "crowdlayer.prom"
    track(wanted('a "run"', None, str(path)))
    text = path.read_text()
    assert text.endswith("# EOF\n")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    sample = re.compile(r'crowdlayer_\w+\{run="a \\"run\\""\} -?[\d.e+-]+')
    assert all(sample.fullmatch(line) for line in lines)
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values.pop("crowdlayer_written_timestamp_seconds") == pytest.approx(time.time(), abs=600)
    assert values == {
        "crowdlayer_epochs": 2,
        "crowdlayer_epoch": 2,
        "crowdlayer_train_loss": 0.5,
        "crowdlayer_test_accuracy": 80,
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]


class Broken(Textfile):
    def log(self, values: Any, step: int | None, **kwargs: Any) -> None:
        raise ConnectionError("the server\nis away")


class Hanging(Textfile):
    def start(self) -> None:
        threading.Event().wait()


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    track({"broken": lambda: Broken(tmp_path / "b", "r"), "whole": lambda: Textfile(tmp_path / "w", "r")})
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["tracker broken: fails, and is not used any more: the server is away"]
    assert "crowdlayer_test_accuracy" in (tmp_path / "w").read_text()


def test_a_tracker_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    track({"hanging": lambda: Hanging(tmp_path / "h", "r")})
    assert "tracker hanging: does not answer" in caplog.text


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_mlflow_whose_server_is_silent_does_not_hold_the_run(
    silent_server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    track(wanted("r", None, None))
    assert "tracker mlflow: does not answer" in caplog.text


def test_mlflow_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    track(wanted("my run", None, None))
    (found,) = tmp_path.glob("*/*/metrics/train/loss")
    assert [line.split()[1:] for line in found.read_text().splitlines()] == [["1.5", "1"], ["0.5", "2"]]


FAKE = """
import logging, os, types
utils = types.SimpleNamespace(validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
ended = []
log = logging.getLogger("mlflow")
if os.environ.get("MLFLOW_CONFIGURE_LOGGING") != "false":
    log.addHandler(logging.StreamHandler())
    log.propagate = False
search_experiments = lambda **_: []
create_experiment = lambda **_: "1"
start_run = lambda **_: log.warning("from MLflow")
log_params = lambda params: None
log_metrics = lambda metrics, step=None: None
def end_run(status="FINISHED"):
    ended.append(status)
    if os.environ.get("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT") != "true":
        print("View run")
"""
"""Of MLflow what Accelerate calls, and the variables that say what it prints."""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder := tmp_path / "fake").mkdir()
    (folder / "mlflow.py").write_text(FAKE)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name in ("MLFLOW_CONFIGURE_LOGGING", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        monkeypatch.setenv(name, "")  # to have it gone again afterwards
        monkeypatch.delenv(name)
    return folder


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (InterruptedRunError("SIGTERM"), "KILLED"), (DataError("x"), "FAILED")]
)
@pytest.mark.usefixtures("fake")
def test_mlflow_is_told_how_the_run_has_ended(error: BaseException | None, status: str) -> None:
    with suppress(InterruptedRunError, DataError), Trackers(wanted("r", None, None), CONFIG):
        if error is not None:
            raise error
    assert sys.modules["mlflow"].ended == [status]
    del sys.modules["mlflow"]


def test_what_mlflow_says_is_an_object_per_line_too(
    fake: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(fake))
    done = run_job(timeout=300, TASKS=str(shapes), OUTPUT=str(tmp_path / "out"), LOG_FORMAT="json", **QUICK)
    assert done.code == 0, done.stderr
    assert "from MLflow" in [json.loads(line)["message"] for line in done.stderr.splitlines()]


class Server(BaseHTTPRequestHandler):
    """MLflow's, as far as a run with a tracker asks it: whatever is told is well."""

    def do(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        experiment = {
            "experiment_id": "1",
            "name": "crowdlayer",
            "lifecycle_stage": "active",
            "artifact_location": "x:/",
        }
        info = {"run_id": "r", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active", "start_time": 1}
        known = {
            "experiments/search": {"experiments": [experiment]},
            "experiments/get-by-name": {"experiment": experiment},
            "experiments/get": {"experiment": experiment},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/get": {"run": {"info": info, "data": {}}},
            "runs/update": {"run_info": info},
        }
        answer = json.dumps(known.get(self.path.partition("?")[0].partition("mlflow/")[2], {})).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PATCH = do  # noqa: N815  http.server's names

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("n_processes", ["1", "2"])
def test_what_mlflow_says_of_its_server_is_not_on_standard_output(
    n_processes: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        done = run_job(timeout=300, TASKS=str(shapes), OUTPUT=str(tmp_path), N_PROCESSES=n_processes, **QUICK)
        server.shutdown()
    assert (done.code, done.stdout) == (0, f"{tmp_path}/results/crowdlayer.json\n"), done.stderr
    assert "View run" in done.stderr


def test_wandb_is_asked_for_by_its_own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wanted("r", None, None) == {}
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(wanted("r", None, None))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_what_nobody_asked_for_is_not_used() -> None:
    assert wanted("r", None, None) == {}


def test_what_is_asked_for_but_not_installed_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert wanted("r", "/tmp/tb", None) == {}
    assert "tracker mlflow: is asked for, but not installed: pip install mlflow" in caplog.text
    assert "tracker tensorboard" in caplog.text


def test_a_run_tells_its_trackers_every_epoch_and_the_test_figures(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "TENSORBOARD": str(tmp_path / "tb")}
    for name, value in (QUICK | at | {"METRICS_FILE": str(tmp_path / "m.prom")}).items():
        monkeypatch.setenv(f"CROWDLAYER_{name}", value)
    results = json.loads(Path(job.train(load_settings())).read_text())
    events = EventAccumulator(str(tmp_path / "tb" / "crowdlayer")).Reload()
    assert [e.value for e in events.Scalars("val/loss")] == pytest.approx(results["val_loss"])
    assert [e.step for e in events.Scalars("val/loss")] == [1, 2]
    accuracy = re.search(r"^crowdlayer_test_accuracy\{.*\} (.*)$", (tmp_path / "m.prom").read_text(), re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) == pytest.approx(results["test_accuracy"])
