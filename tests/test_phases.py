"""A signal in each phase of a job: it ends with 75, and the next start ends as if nothing had been."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.aim import Aim
from tests.conftest import Finished
from tests.crowds import write_shapes
from tests.forks import Forks

SETTINGS = {
    "MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": "32", "BATCH_SIZE": "8", "LR": "0.01", "N_EPOCHS": "3",
    "OPTIMIZER": "adam", "DATA_AUGMENTATION": "true", "GUARD": "false", "NUM_WORKERS": "2", "GRACE": "60",
}  # fmt: skip
ALONE = {
    "sync": Aim("sync"),
    "read": Aim("read_dataset"),
    "decode": Aim("decode_with_aspect", 7),
    "build": Aim("Experiment.trainer"),
    "training": Aim("Learner._loss", 6),
    "evaluation": Aim("Trainer.validate", 2),
    "checkpoint": Aim("Spool._write_part", 3),
    "upload": Aim("Checkpoints.put", 2),
    "last evaluation": Aim("infer"),
    "results": Aim("publish"),
    "publish": Aim("Folder.upload", 12),
    "tidying": Aim("Checkpoints.remove"),
}
"""The phases of a job of one process."""
JOB = {name: ALONE[name] for name in ("sync", "decode", "upload", "results", "publish")}
TOGETHER = {
    "plan": Aim("hand"),
    "start": Aim("_Gang.wait"),
    **{f"{name} of the job": aim for name, aim in JOB.items()},
    **{
        f"{name} of process {rank}": replace(aim, rank=rank)
        for rank, (name, aim) in product(
            "01",
            {
                "plan": Aim("take"),
                "meeting": Aim("Meeting.join"),
                "joining": Aim("join"),
                **{name: ALONE[name] for name in ("build", "training", "evaluation", "last evaluation")},
            }.items(),
        )
    },
    "checkpoint of process 0": replace(ALONE["checkpoint"], rank="0"),
    "handing over of process 0": Aim("hand", rank="0"),
}
"""Of a job of two."""
WAYS = [(group, twice) for group in (False, True) for twice in (False, True)]

Run = Callable[..., Finished]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), n_train=30)


def run(forks: Forks, data: Path, folder: Path, n_processes: int, aim: Aim | None = None, **others: str) -> Finished:
    settings = (
        SETTINGS
        | others
        | {
            "TASKS": str(data),
            "OUTPUT": str(folder / "out"),
            "WORKDIR": str(folder / "work"),
            "N_PROCESSES": str(n_processes),
        }
    )
    environment = dict(os.environ) | {f"CROWDLAYER_{name}": value for name, value in settings.items()}
    return Finished(*forks.run([], environment | ({} if aim is None else aim.environment(folder)), timeout=300))


def published(folder: Path) -> dict[str, Any]:
    """The results without what is of one run alone, and every weight of the model."""
    results: dict[str, Any] = json.loads((folder / "out/results/crowdlayer.json").read_text())
    del results["job"]
    model = torch.load(folder / "out/best_models/crowdlayer.pth", weights_only=True)
    weights = {name: weight.numpy().tobytes() for name, weight in model["classifier"].items()}
    return results | weights | {"confusion": model["confusion"].numpy().tobytes()}


@pytest.fixture(scope="module")
def whole(forks: Forks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What a run of so many processes that nobody interrupts has published."""
    found: dict[int, dict[str, Any]] = {}

    def uninterrupted(n_processes: int) -> dict[str, Any]:
        if n_processes not in found:
            folder = tmp_path_factory.mktemp("whole")
            assert run(forks, data, folder, n_processes).code == 0
            found[n_processes] = published(folder)
        return found[n_processes]

    return uninterrupted


def cases() -> Iterator[Any]:
    """Every other phase of a job of one process in one of the ways; all else is slow."""
    for n_processes, phases in ((1, ALONE), (2, TOGETHER)):
        for number, (phase, (group, twice)) in enumerate(product(phases, WAYS)):
            quick = n_processes == 1 and number % (2 * len(WAYS)) == number // (2 * len(WAYS)) % len(WAYS)
            aim = replace(phases[phase], group=group, twice=twice)
            name = f"{n_processes}, {phase}, {'group' if group else 'first'}, {'twice' if twice else 'once'}"
            yield pytest.param(n_processes, aim, id=name, marks=[] if quick else pytest.mark.slow)
    yield pytest.param(3, Aim("Learner._loss", 6, rank="2"), id="3, training of process 2", marks=pytest.mark.slow)


@pytest.mark.parametrize(("n_processes", "aim"), list(cases()))
def test_a_signal_in_any_phase_costs_nothing_but_time(
    n_processes: int,
    aim: Aim,
    forks: Forks,
    data: Path,
    tmp_path: Path,
    whole: Callable[[int], dict[str, Any]],
) -> None:
    stopped = run(forks, data, tmp_path, n_processes, aim)
    assert stopped.code == 75, stopped.stderr
    assert "the run was interrupted" in stopped.last_line
    assert "did not stop within" not in stopped.stderr
    assert "have not stopped in time" not in stopped.stderr
    again = run(forks, data, tmp_path, n_processes)
    assert again.code == 0, stopped.stderr + again.stderr
    assert published(tmp_path) == whole(n_processes)
    assert not (tmp_path / "out/checkpoints").exists()


@pytest.mark.parametrize(
    ("n_processes", "aim"),
    [
        (1, Aim("over")),
        (1, Aim("LastWords.of")),
        (1, Aim("failed")),
        pytest.param(2, Aim("over", rank="0", own=True), marks=pytest.mark.slow),
        (2, Aim("LastWords.write", rank="0", own=True)),
        pytest.param(2, Aim("shutdown", rank="1", own=True), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_a_process_that_is_on_its_way_out_costs_no_reason(
    n_processes: int, aim: Aim, forks: Forks, data: Path, tmp_path: Path
) -> None:
    """Who ends first of several has the others told, which may be about to end themselves."""
    ended = run(forks, data, tmp_path, n_processes, aim, LR="1e30", OPTIMIZER="sgd")
    assert ended.code == 78, ended.stderr
    assert "loss: must be finite" in ended.last_line
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("function", ["LastWords.of", "failed", "without_secrets"])
def test_a_signal_while_a_setting_is_refused_costs_no_reason_either(
    function: str, forks: Forks, data: Path, tmp_path: Path
) -> None:
    """Before the work begins a signal ends the process at once; it has ended."""
    ended = run(forks, data, tmp_path, 1, Aim(function), LR="slow")
    assert ended.code == 78, ended.stderr
    assert "CROWDLAYER_LR: should be a valid number" in ended.last_line
    assert "interrupted" not in ended.stderr


def test_a_signal_to_a_job_that_is_done_leaves_it_done(forks: Forks, data: Path, tmp_path: Path) -> None:
    assert run(forks, data, tmp_path, 1, Aim("over"), N_EPOCHS="1").code == 75
    again = run(forks, data, tmp_path, 1, N_EPOCHS="1")
    assert again.code == 0
    assert "already done" in again.stderr
