"""Two nodes of one run, on this machine: what becomes of one is what becomes of the other."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.crowds import write_shapes
from tests.jobs import DONE, INTERRUPTED, Job, training_process, wait_for
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("nobody_is_left")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), n_train=30)


def two_nodes(data: tuple[Path, Path], out: Path, n_epochs: int = 2) -> tuple[Job, Job]:
    """Of an Indexed Job, each with its own data folder; they share a file system."""
    address = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, other = (
        Job(data[node], out, n_epochs, n_processes=1, variables=address | {"JOB_COMPLETION_INDEX": str(node)})
        for node in range(2)
    )
    return first, other


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_node_that_cannot_use_its_data_is_the_reason_of_both(data: Path, tmp_path: Path, faulty: int) -> None:
    """Whether the other waits for it by then or comes to that later: long before the time-out."""
    bad = shutil.copytree(data, tmp_path / "data")
    (bad / "answers.json").write_text('{"0": ')
    jobs = two_nodes((bad, data) if faulty == 0 else (data, bad), tmp_path / "out")
    started = [job.start() for job in jobs]

    assert [job.ended(process) for job, process in zip(jobs, started, strict=True)] == [65, 65]

    said = "answers.json: must be JSON {task: {worker: label}}: Input data was truncated"
    assert jobs[faulty].log[-1] == f"crowdlayer: {said}"
    assert jobs[1 - faulty].log[-1] == f"crowdlayer: node {faulty}: {said}"
    assert not any("Traceback" in line for job in jobs for line in job.log)


def test_nodes_with_unlike_numbers_of_processes_are_refused_at_once(data: Path, tmp_path: Path) -> None:
    """Long before the time-out; each would wait for as many as it has itself."""
    jobs = two_nodes((data, data), tmp_path / "out")
    jobs[1].n_processes = 2
    started = [job.start() for job in jobs]

    assert [job.ended(process) for job, process in zip(jobs, started, strict=True)] == [78, 78]

    last = sorted((job.log[-1] for job in jobs), key=len)
    said = r"N_PROCESSES: must be the same on all nodes, is (1 here and 2|2 here and 1) on another"
    assert re.fullmatch(f"crowdlayer: {said}", last[0])
    assert re.fullmatch(rf"crowdlayer: node \d: {said}", last[1])


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_training_process_that_is_killed_on_one_node_is_the_reason_of_both(
    data: Path, tmp_path: Path, faulty: int
) -> None:
    jobs = two_nodes((data, data), tmp_path / "out", n_epochs=100_000)
    started = [job.start() for job in jobs]
    wait_for(started[0], "epoch      3/", jobs[0])

    os.kill(training_process(started[faulty], faulty), signal.SIGKILL)

    assert [job.ended(process) for job, process in zip(jobs, started, strict=True)] == [137, 137]
    said = f"process {faulty}: must end by itself, was killed by SIGKILL"
    assert jobs[faulty].log[-1] == f"crowdlayer: {said}"
    assert jobs[1 - faulty].log[-1] == f"crowdlayer: node {faulty}: {said}"


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_node_that_is_told_to_stop_stops_both_and_the_checkpoint_is_there(
    data: Path, tmp_path: Path, told: int
) -> None:
    """The node that hears of it from the other does not end its processes while they save."""
    jobs = two_nodes((data, data), tmp_path / "out", n_epochs=100_000)
    started = [job.start() for job in jobs]
    wait_for(started[0], "epoch      3/", jobs[0])

    started[told].send_signal(signal.SIGTERM)

    assert [job.ended(process) for job, process in zip(jobs, started, strict=True)] == [INTERRUPTED, INTERRUPTED]
    assert "; the checkpoint is at " in jobs[0].log[-1]
    assert Path(jobs[0].log[-1].rpartition(" ")[2]).is_file()


@pytest.mark.slow
def test_a_node_is_there_again_when_the_first_could_not_publish(data: Path, tmp_path: Path) -> None:
    """For an Indexed Job starts no index again that has ended with 0."""
    first, other = two_nodes((data, data), tmp_path / "out")
    publishing, staying = first.start(), other.start()
    wait_for(publishing, "epoch 2/2", first)
    while True:
        try:
            training_process(publishing, rank=0)
        except (AssertionError, ProcessLookupError):
            break
        time.sleep(0.02)
    publishing.send_signal(signal.SIGTERM)
    assert first.ended(publishing) == INTERRUPTED, "\n".join(first.log)
    assert other.ended(staying) in (74, INTERRUPTED), "\n".join(other.log)

    publishing, staying = first.start(), other.start()
    assert first.ended(publishing) == DONE, "\n".join(first.log)
    assert other.ended(staying) == DONE, "\n".join(other.log)
    assert first.results()["best_epoch"]
