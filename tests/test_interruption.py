"""A job that is killed, again and again, ends with the results of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crowdlayer.machine.last_words import LastWords
from tests.conftest import ROOT
from tests.crowds import write_shapes
from tests.jobs import DONE, INTERRUPTED, Job, training_process, wait_for
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("nobody_is_left")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file that bears the name of a module of Python's: it is not run, though jobs are started there."""
    folder = write_shapes(tmp_path_factory.mktemp("shapes"), n_train=30)
    (folder / "selectors.py").write_text("raise SystemExit('a file of the data set was run')\n")
    return folder


def assert_same(job: Job, whole: Job) -> None:
    assert job.results() == whole.results()
    ours, theirs = job.model(), whole.model()
    assert torch.equal(ours["confusion"], theirs["confusion"])
    assert all(torch.equal(tensor, theirs["classifier"][name]) for name, tensor in ours["classifier"].items())
    assert not (job.out / "checkpoints").exists()


def test_a_killed_job_ends_with_the_results_of_one_that_was_not(data: Path, tmp_path: Path) -> None:
    """One of its two processes is killed; then the whole group is told to stop, twice; then it goes on to its end."""
    whole = Job(data, tmp_path / "whole", n_epochs=4)
    assert whole.finish() == DONE, "\n".join(whole.log)
    job = Job(data, tmp_path / "out", n_epochs=4)

    process = job.start()
    wait_for(process, "epoch 1/4", job)
    os.kill(training_process(process, rank=1), signal.SIGKILL)
    assert job.ended(process) == 137
    assert job.log[-1] == "crowdlayer: process 1: must end by itself, was killed by SIGKILL"

    process = job.start()
    wait_for(process, "epoch 2/4", job)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    assert job.ended(process) == INTERRUPTED, "\n".join(job.log)
    assert "SIGTERM: the run was interrupted in epoch" in job.log[-1]
    assert "the checkpoint is at" in job.log[-1]

    assert job.finish() == DONE, "\n".join(job.log)
    assert any("going on from checkpoint" in line for line in job.log)
    assert_same(job, whole)


DROPPED = """
import signal, sys, time
from crowdlayer.errors import InterruptedRunError
from crowdlayer.machine import interruption

class Trap:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)  # its answer is an exception, of which Python makes nothing here

class Other:
    def __del__(self):
        raise ValueError("another's")

interruption.listen(lambda line, code: code)
interruption.begin(25)
Other()
try:
    Trap()
    time.sleep(30)
except InterruptedRunError as error:
    print(error)
time.sleep(0.2)  # once is enough
"""


def test_a_signal_that_comes_where_no_exception_can_go_is_answered_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "SIGTERM: the run was interrupted\n"), done.stderr
    assert "another's" in done.stderr
    assert "InterruptedRunError" not in done.stderr


IMPORTING = """
import os, signal, sys
from pathlib import Path

class Finder:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder)
if sys.argv[4] == "job":
    import entrypoint
    os._exit(entrypoint.main(["--check"]))
from crowdlayer.process import main
main()
"""
"""A job or one of its training processes, told to stop when it comes to import that module."""


@pytest.mark.parametrize("kind", ["job", "process"])
@pytest.mark.parametrize("module", ["torch", "numpy", "numpy._core.overrides"])
def test_a_signal_that_comes_while_torch_is_imported_ends_the_process_at_once(
    kind: str, module: str, tmp_path: Path
) -> None:
    """numpy, which torch imports in C: that drops an exception, and what comes after it fails or recurses."""
    peers = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(tmp_path), str(os.getpid()), module, kind],
        env=dict(os.environ) | {"CROWDLAYER_TASKS": "nowhere"} | (peers | address if kind == "process" else {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = LastWords.read(tmp_path, 1)
    line = done.stderr if kind == "job" else f"crowdlayer: {said.line if said else ''}\n"
    assert (done.returncode, line) == (INTERRUPTED, "crowdlayer: SIGTERM: the run was interrupted\n"), done.stderr


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(data: Path, tmp_path: Path) -> None:
    """SIGTERM to the job alone or to its group, SIGKILL to its group or to one training process, at any time."""
    n_epochs, n_kills = 30, int(os.environ.get("KILLS", "20"))
    whole = Job(data, tmp_path / "whole", n_epochs)
    started = time.monotonic()
    assert whole.finish() == DONE, "\n".join(whole.log)
    life = time.monotonic() - started
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    print(f"uninterrupted: {life:.1f} s")

    job, kills, ends = Job(data, tmp_path / "out", n_epochs), 0, 0
    while kills < n_kills:
        process, moment = job.start(), rng.uniform(0, 1.2 * life)
        how = rng.choice(["TERM", "TERM group", "KILL group", "KILL one"])
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            kills += 1
            told = time.monotonic()
            match how:
                case "TERM":
                    process.send_signal(signal.SIGTERM)
                case "TERM group":
                    os.killpg(process.pid, signal.SIGTERM)
                case "KILL group":
                    os.killpg(process.pid, signal.SIGKILL)
                case _:
                    try:
                        os.kill(training_process(process, rng.randrange(2)), signal.SIGKILL)
                    except AssertionError:  # not there yet, or not any more
                        os.killpg(process.pid, signal.SIGKILL)
            code = job.ended(process)
            print(f"{how} after {moment:.1f} s: {code} in {time.monotonic() - told:.1f} s: {job.log[-1:]}")
            assert code in {"T": (INTERRUPTED, DONE), "K": (-signal.SIGKILL, 137, DONE)}[how[0]], "\n".join(job.log)
        else:
            assert job.ended(process) == DONE, "\n".join(job.log)
            assert_same(job, whole)
            ends += 1
            job = Job(data, tmp_path / f"out-{ends}", n_epochs)
    assert job.finish() == DONE, "\n".join(job.log)
    assert_same(job, whole)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(data: Path, tmp_path: Path) -> None:
    """Which is nothing to the order of the tasks, and to the figures no more than batch norm makes of it."""
    job = Job(data, tmp_path / "out", n_epochs=3, n_processes=2)
    process = job.start()
    wait_for(process, "epoch 1/3", job)
    os.kill(process.pid, signal.SIGUSR1)
    assert job.ended(process) == INTERRUPTED, "\n".join(job.log)
    job.n_processes = 1
    assert job.finish() == DONE, "\n".join(job.log)
    assert len(job.results()["train_loss"]) == 3


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_job(data: Path, tmp_path: Path) -> None:
    """It answers nobody, and cannot end itself: the other misses it, or the job misses its signs of life."""
    job = Job(data, tmp_path / "out", n_epochs=1000, timeout=60)
    process = job.start()
    wait_for(process, "epoch    1/1000", job)
    os.kill(training_process(process, rank=1), signal.SIGSTOP)
    assert job.ended(process) == 74
    assert "another process of the run is gone or silent" in job.log[-1] or "signs of life" in job.log[-1]


@pytest.mark.slow
def test_a_job_that_is_suspended_again_and_again_goes_on(data: Path, tmp_path: Path) -> None:
    """For less than TIMEOUT each time, and in all for longer."""
    job = Job(data, tmp_path / "out", n_epochs=25, timeout=20)
    process = job.start()
    for epoch in (3, 9, 15):
        wait_for(process, f"epoch {epoch:2}/25", job)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(15)
        os.killpg(process.pid, signal.SIGCONT)
    assert job.ended(process) == DONE, "\n".join(job.log)
