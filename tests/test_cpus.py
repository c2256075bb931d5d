"""The CPUs that are this job's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crowdlayer.machine.cpus import cpus
from tests.conftest import ROOT

HERE = len(os.sched_getaffinity(0))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "100000 100000\n"},
        {"cpu.max": "50000 100000\n"},
        {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        {"job/cpu.max": "100000 100000\n", "job/step/cpu.max": "max 100000\n"},
        {"cpu/job/step/cpu.cfs_quota_us": "100000\n", "cpu/job/step/cpu.cfs_period_us": "100000\n"},
    ],
    ids=["version 2", "half a CPU", "version 1", "of the group around", "version 1, its own"],
)
def test_a_quota_of_a_group_around_the_process_counts(cgroup: Path, files: dict[str, str]) -> None:
    write(cgroup, files)
    assert cpus() == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000\n"},
        {"cpu.max": "100000000 100000\n"},
        {"cpu.max": ""},
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        {"job/other/cpu.max": "100000 100000\n"},
    ],
    ids=["no cgroup", "no limit", "more than there are", "empty", "version 1 without limit", "of another group"],
)
def test_without_a_quota_it_is_what_the_process_may_run_on(cgroup: Path, files: dict[str, str]) -> None:
    write(cgroup, files)
    assert cpus() == HERE


@pytest.mark.skipif(HERE < 2, reason="one CPU")
def test_a_binding_to_one_cpu_counts() -> None:
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    script = f"{bind}; from crowdlayer.machine.cpus import cpus; print(cpus())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_tests_compute_in_one_thread() -> None:
    """Threads that wait for each other took four times the CPU, as long as torch came before conftest had said so."""
    script = "import tests.conftest, torch; print(torch.get_num_threads())"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
