"""Jobs in processes of their own, to be killed and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.conftest import ROOT

SETTINGS = {
    "MODEL": "shufflenet_v2_x0_5",
    "IMG_SIZE": "32",
    "BATCH_SIZE": "6",
    "LR": "0.01",
    "SCHEDULER": "cosine",
    "DATA_AUGMENTATION": "true",
    "GUARD": "false",
    "OPTIMIZER": "adam",
}
DONE, INTERRUPTED = 0, 75


@dataclass
class Job:
    """A job of two processes or more, in a process group of its own; started again and again."""

    data: Path
    out: Path
    n_epochs: int
    n_processes: int = 2
    timeout: int = 1800
    variables: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    started: ClassVar[list[subprocess.Popen[str]]] = []

    def start(self) -> subprocess.Popen[str]:
        settings = SETTINGS | {
            "TASKS": str(self.data),
            "OUTPUT": str(self.out),
            "WORKDIR": str(self.out.with_name(f"{self.out.name}-work")),
            "N_PROCESSES": str(self.n_processes),
            "N_EPOCHS": str(self.n_epochs),
            "TIMEOUT": str(self.timeout),
        }
        environment = dict(os.environ) | {f"CROWDLAYER_{name}": value for name, value in settings.items()}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py")],
            env=environment | {"OMP_NUM_THREADS": "1"} | self.variables,
            cwd=self.data,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def ended(self, process: subprocess.Popen[str]) -> int:
        """Its exit code, once all that it had to say is read: nobody of its group speaks any more."""
        assert process.stdout is not None
        with process.stdout:
            self.log += process.stdout.read().splitlines()
        return process.wait()

    def finish(self) -> int:
        return self.ended(self.start())

    def results(self) -> dict[str, Any]:
        """The results without what is of one run alone; with the digests of all files but those that tell of it."""
        found: dict[str, Any] = json.loads((self.out / "results" / "crowdlayer.json").read_text())
        job = found.pop("job")
        same = ("labels.csv", "workers.csv", "confusion.csv", ".pth")
        return found | {"files": {name: digest for name, digest in job["files"].items() if name.endswith(same)}}

    def model(self) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.out / "best_models" / "crowdlayer.pth", weights_only=True)
        return loaded


def wait_for(process: subprocess.Popen[str], text: str, job: Job) -> None:
    """Until it says so."""
    assert process.stdout is not None
    for line in process.stdout:
        job.log.append(line.rstrip())
        if text in line:
            return
    raise AssertionError("\n".join(job.log))


def training_process(process: subprocess.Popen[str], rank: int) -> int:
    """The id of the training process of that rank."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    for pid in children.stdout.split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(pid)
    raise AssertionError(f"no training process {rank} among {children.stdout.split()}")


def nobody_is_left() -> None:
    """Kill the jobs of a test that have not ended."""
    while Job.started:
        process = Job.started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
