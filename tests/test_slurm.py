"""The batch script on a Slurm of two virtual nodes: trained, cancelled, told to stop, short of time, queued again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SHARED
from tests.crowds import write_shapes

RIG = SHARED / "tools/platforms/start-slurm"
SCRIPT = ROOT / "crowdlayer/platforms/slurm/crowdlayer.sbatch"
LONG = 300.0
"""Seconds after which something hangs; Slurm takes one of its own before it starts a job again."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RIG.is_file() or os.geteuid() != 0, reason="Slurm needs the rig, which needs root"),
]


@dataclass(frozen=True)
class Slurm:
    """The rig, whose nodes have two CPUs and two pretended GPUs each."""

    data: Path
    folder: Path

    def submit(self, output: Path, tasks_per_node: int, *more: str, n_epochs: int = 30) -> str:
        """The number of a job on both nodes; of four processes each has batch norm over three images: a low rate."""
        settings = {
            "TASKS": self.data, "OUTPUT": output, "MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": 32, "BATCH_SIZE": 12,
            "LR": 0.001, "GUARD": "false", "N_EPOCHS": n_epochs, "N_PROCESSES": "auto", "TIMEOUT": 120,
        }  # fmt: skip
        variables = {f"CROWDLAYER_{name}": str(value) for name, value in settings.items()}
        options = ["--nodes=2", f"--ntasks-per-node={tasks_per_node}", "--gpus-per-node=2", "--cpus-per-task=1"]
        return self._ask("sbatch", "--parsable", *options, "--time=10", *more, str(SCRIPT), **variables)

    def tell(self, *command: str) -> None:
        self._ask(*command)

    def _ask(self, *command: str, **variables: str) -> str:
        environment = (
            dict(os.environ) | variables | {"PYTHON": sys.executable, "APP": str(ROOT), "OMP_NUM_THREADS": "1"}
        )
        return subprocess.run(
            command, cwd=self.folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()

    def log(self, job: str) -> str:
        path = self.folder / f"crowdlayer-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG
        while not there():
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)

    def ended(self, job: str) -> str:
        """What Slurm calls the end of the job."""

        def state() -> str:
            told = dict(part.partition("=")[::2] for part in self._ask("scontrol", "show", "job", job).split())
            return told["JobState"]

        self.wait(job, lambda: state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        return state()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    rig = {"SLURM_RIG": str(folder / "rig"), "SLURM_FAKE_GPUS": "2", "SLURM_CPUS": "2"}
    subprocess.run([str(RIG), "2"], env=dict(os.environ) | rig, check=True, stdout=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SLURM_CONF", str(folder / "rig/slurm.conf"))
            yield Slurm(write_shapes(folder / "shapes", n_train=30), folder)
    finally:
        subprocess.run([str(RIG.with_name("stop-slurm"))], env=dict(os.environ) | rig, stdout=subprocess.DEVNULL)


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results/crowdlayer.json").read_text())
    del found["job"]
    return found


def epochs(log: str) -> list[int]:
    """Those that a job says it has trained."""
    return [int(number) for number in re.findall(r"epoch +(\d+)/", log)]


@pytest.mark.parametrize("tasks_per_node", [1, 2])
def test_a_job_that_slurm_stops_goes_on_and_ends_as_one_that_it_did_not(
    slurm: Slurm, tmp_path: Path, tasks_per_node: int
) -> None:
    """One task per node, or one per GPU. First it is cancelled, then its step is told to stop: that it queues again."""
    whole = slurm.submit(tmp_path / "whole", tasks_per_node)
    assert slurm.ended(whole) == "COMPLETED", slurm.log(whole)
    assert slurm.log(whole).count("I results at") == 1

    output = tmp_path / "out"
    cancelled = slurm.submit(output, tasks_per_node)
    slurm.wait(cancelled, lambda: "epoch  5/30" in slurm.log(cancelled))
    slurm.tell("scancel", cancelled)
    assert slurm.ended(cancelled) == "CANCELLED"
    slurm.wait(cancelled, lambda: slurm.log(cancelled).count("Exited with exit code 75") >= 1)
    assert slurm.log(cancelled).count("the checkpoint is at") == 1, slurm.log(cancelled)

    job = slurm.submit(output, tasks_per_node)
    slurm.wait(job, lambda: "epoch 12/30" in slurm.log(job))
    slurm.tell("scancel", "--signal=USR1", job)
    slurm.wait(job, lambda: "ended with 75: requeued" in slurm.log(job))
    slurm.wait(job, (output / "results/crowdlayer.json").exists)
    assert slurm.ended(job) == "COMPLETED", slurm.log(job)
    assert slurm.log(job).count("going on from checkpoint") == 2
    assert results(output) == results(tmp_path / "whole")


def test_a_job_is_told_before_its_time_is_up_and_goes_on_when_it_has_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    """Of three minutes the script wants the last two for saving, and Slurm's signal may come up to one earlier."""
    job = slurm.submit(tmp_path, 1, "--nodes=1", "--time=3", n_epochs=100_000)
    slurm.wait(job, lambda: "going on from checkpoint" in slurm.log(job))
    before = slurm.log(job).partition("ended with 75: requeued")[0]
    trained = epochs(before)
    assert trained, before
    assert before.count("the checkpoint is at") == 1, before
    slurm.wait(job, lambda: len(epochs(slurm.log(job))) > len(trained) + 1)
    slurm.tell("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    assert epochs(slurm.log(job)) == list(range(1, len(epochs(slurm.log(job))) + 1))
