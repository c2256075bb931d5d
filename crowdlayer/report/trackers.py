"""Figures per epoch to the trackers that people look at, through Accelerate's own classes. None can hurt a run."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from .. import __version__
from ..errors import one_line
from ..storage.durable import whole

log = logging.getLogger(__name__)

PROJECT = "crowdlayer"
"""The project or experiment where MLflow's or W&B's own variables name none."""
PATIENCE = 30.0
"""Seconds that the end of a run waits for a tracker's last words."""
LESS_PATIENCE = 3.0
"""The same where the run ends by an error or a signal: the platform's grace period is short."""
Figures = Mapping[str, float]


class Textfile(GeneralTracker):  # type: ignore[misc]
    """The newest figures as OpenMetrics text, in a file that Prometheus' node exporter collects."""

    name = "openmetrics"
    requires_logging_directory = False

    def __init__(self, path: Path, run_name: str) -> None:
        super().__init__()
        self.path = path
        self.run_name = run_name
        self.figures: dict[str, float] = {}

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.figures["epochs"] = values["n_epochs"]

    def log(self, values: Figures, step: int | None, **kwargs: Any) -> None:
        """Write all figures anew, whole or not at all: the exporter never reads half a file."""
        self.figures |= values
        if step is not None:
            self.figures["epoch"] = step
        self.figures["written_timestamp_seconds"] = round(time.time(), 3)
        label = self.run_name.replace("\\", r"\\").replace('"', r"\"")
        lines = []
        for name, value in self.figures.items():
            metric = "crowdlayer_" + re.sub(r"\W", "_", name, flags=re.ASCII).lower()
            lines += [f"# TYPE {metric} gauge", f'{metric}{{run="{label}"}} {float(value)!r}']
        with whole(self.path) as file:
            file.write("\n".join([*lines, "# EOF", ""]).encode())

    def finish(self) -> None:
        """The last figures stay."""


class MLflow(MLflowTracker):  # type: ignore[misc]
    """Accelerate's, with how the run has ended: it takes every one for finished."""

    status = "FINISHED"

    def finish(self) -> None:
        import mlflow

        mlflow.end_run(self.status)


class Trackers:
    """The trackers of one run, as a context; each in a thread of its own.

    What a tracker raises becomes one warning, and it is not asked again; one that hangs keeps nobody waiting.
    """

    def __init__(self, made: Mapping[str, Callable[[], GeneralTracker]], config: Mapping[str, Any]) -> None:
        """`made`: what makes each tracker, by its name; `config`: the run's settings."""
        self._threads = [_Apart(name, make, config) for name, make in made.items()]

    def __enter__(self) -> Trackers:
        for thread in self._threads:
            thread.start()
        return self

    def log(self, figures: Figures, step: int | None = None) -> None:
        """Tell every tracker the figures of epoch `step`, or those of the whole run."""
        for thread in self._threads:
            thread.todo.put((dict(figures), step))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)  # as an interruption is one
        status = "FINISHED" if kind is None else "KILLED" if killed else "FAILED"
        for thread in self._threads:
            thread.todo.put(status)
        until = time.monotonic() + (PATIENCE if kind is None else LESS_PATIENCE)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                log.warning("tracker %s: does not answer; its last figures may be missing", thread.name)


class _Apart(threading.Thread):
    def __init__(self, name: str, make: Callable[[], GeneralTracker], config: Mapping[str, Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.todo: queue.SimpleQueue[tuple[dict[str, float], int | None] | str] = queue.SimpleQueue()
        """Figures with their epoch; at last how the run has ended, in MLflow's words."""
        self._make = make
        self._config = {k: v if isinstance(v, str | int | float) else str(v) for k, v in config.items()}

    def run(self) -> None:
        try:
            tracker = self._make()
            tracker.start()
            tracker.store_init_configuration(self._config)
            while not isinstance(item := self.todo.get(), str):
                figures, step = item
                tracker.log(figures, step=step)
            if isinstance(tracker, MLflow):
                tracker.status = item
            tracker.finish()
        except Exception as error:  # other people's libraries, servers and networks: whatever it is, the run goes on
            log.warning("tracker %s: fails, and is not used any more: %s", self.name, one_line(str(error))[:300])


def wanted(
    run_name: str, tensorboard: str | None, metrics_file: str | None, log_format: str = "text"
) -> dict[str, Callable[[], GeneralTracker]]:
    """What makes each tracker that is asked for: by our settings, or by MLflow's and W&B's own variables.

    Args:
        tensorboard: the folder for TensorBoard's event files.
        metrics_file: the file of OpenMetrics text.
        log_format: in json MLflow's links to the run are left out, which it prints.
    """
    made: dict[str, Callable[[], GeneralTracker]] = {}
    if tensorboard is not None and _installed("tensorboard"):
        made["tensorboard"] = lambda: TensorBoardTracker(run_name, tensorboard)
    if metrics_file is not None:
        made["openmetrics"] = lambda: Textfile(Path(metrics_file), run_name)
    if _asked_for(("MLFLOW_TRACKING_URI",)) and _installed("mlflow"):
        os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # what it logs comes to our log, as our lines do
        if log_format == "json":
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        made["mlflow"] = lambda: MLflow(PROJECT, run_name=run_name, tags={"crowdlayer": __version__})
    if (
        _asked_for(("WANDB_API_KEY", "WANDB_MODE"))
        and os.environ.get("WANDB_MODE") != "disabled"
        and _installed("wandb")
    ):
        os.environ.setdefault("WANDB_SILENT", "true")  # standard error is our log's
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        made["wandb"] = lambda: WandBTracker(
            project,
            name=os.environ.get("WANDB_NAME", run_name),
            settings={"console": "off"},  # standard output is ours
        )
    return made


def _asked_for(variables: Sequence[str]) -> bool:
    return any(os.environ.get(name) for name in variables)


def _installed(package: str) -> bool:
    there = importlib.util.find_spec(package) is not None
    if not there:
        log.warning("tracker %s: is asked for, but not installed: pip install %s", package, package)
    return there
