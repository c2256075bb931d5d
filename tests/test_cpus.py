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


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "100000 100000\n"},
        {"cpu.max": "50000 100000\n"},
        {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
    ids=["version 2", "half a CPU", "version 1"],
)
def test_a_containers_quota_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert cpus(write(tmp_path, files)) == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000\n"},
        {"cpu.max": "100000000 100000\n"},
        {"cpu.max": ""},
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
    ids=["no cgroup", "no limit", "more than there are", "empty", "version 1 without limit"],
)
def test_without_a_quota_it_is_what_the_process_may_run_on(tmp_path: Path, files: dict[str, str]) -> None:
    assert cpus(write(tmp_path, files)) == HERE


@pytest.mark.skipif(HERE < 2, reason="one CPU")
def test_a_binding_to_one_cpu_counts() -> None:
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    script = f"{bind}; from crowdlayer.machine.cpus import cpus; print(cpus())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
