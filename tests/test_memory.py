"""Memory, as a cgroup's files tell of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from crowdlayer.errors import DeviceMemoryError
from crowdlayer.machine import memory
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 8 GiB."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 8388608 kB\n")


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def test_without_a_cgroup_the_host_counts(cgroup: Path) -> None:
    assert memory.free_memory() == 8 * 2**30


def test_memory_is_the_cgroups_and_its_file_cache_counts_as_free(cgroup: Path) -> None:
    write(
        cgroup,
        memory_dot_max=str(2**30),
        memory_dot_current=str(2**29),
        memory_dot_stat=f"anon 7\ninactive_file {2**20}\nactive_file {2**21}\n",
    )
    assert memory.free_memory() == 2**29 + 2**20 + 2**21
    write(cgroup, memory_dot_max="max")
    assert memory.free_memory() == 8 * 2**30


def test_the_tightest_of_the_groups_around_the_process_counts(cgroup: Path) -> None:
    """Slurm limits the job and, below it, each step, in folders that the process sees as they are."""
    write(cgroup / "job/step", memory_dot_max=str(2**31), memory_dot_current="0")
    write(cgroup / "job", memory_dot_max=str(2**30), memory_dot_current=str(2**29))
    write(cgroup / "another", memory_dot_max="7", memory_dot_current="7")
    assert memory.free_memory() == 2**29


def test_version_1_says_it_in_other_files(cgroup: Path) -> None:
    group = cgroup / "memory/job/step"
    write(cgroup / "memory", memory_dot_limit_in_bytes=str(2**63 - 4096), memory_dot_usage_in_bytes=str(2**33))
    write(group, memory_dot_limit_in_bytes=str(2**30), memory_dot_usage_in_bytes=str(2**29))
    assert memory.free_memory() == 2**29
    write(group, memory_dot_stat=f"inactive_file 0\nactive_file 0\ntotal_inactive_file {2**20}\n")
    assert memory.free_memory() == 2**29 + 2**20


def test_a_folder_is_in_memory_where_its_mount_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "mounts").write_text(f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path}/a\\040b tmpfs rw 0 0\n")
    assert memory.in_memory(tmp_path / "a b" / "c")
    assert not memory.in_memory(tmp_path)


def test_a_container_too_small_for_the_libraries_is_refused(cgroup: Path) -> None:
    memory.enough_to_start()
    write(cgroup, memory_dot_max=str(300 * 10**6), memory_dot_current="7")
    with pytest.raises(DeviceMemoryError, match=r"must be at least 537 MB for the libraries alone, it is 300 MB"):
        memory.enough_to_start()


def test_an_allocation_that_fails_without_a_word_is_told_with_what_there_was() -> None:
    assert re.fullmatch(r"out of memory: \d+ of \d+ MB were used", memory.too_little(MemoryError()))
    assert memory.too_little(MemoryError("Unable to allocate\n7 GiB")) == "out of memory: Unable to allocate 7 GiB"


def test_what_the_container_has_no_memory_for_is_refused_and_not_killed(cgroup: Path) -> None:
    write(cgroup, memory_dot_max=str(2**30), memory_dot_current=str(2**30 - 2**28))
    script = f"""if True:
        from pathlib import Path
        from crowdlayer.machine import cgroups, memory
        cgroups.ROOT = Path({str(cgroup)!r})
        memory.allocations_must_fit(1)
        bytearray(2**27)
        try:
            bytearray(2**29)
        except MemoryError:
            print("said")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "said\n", done.stderr


def test_what_is_used_is_the_processs_own_and_not_the_pages_of_files(cgroup: Path, tmp_path: Path) -> None:
    if memory.in_memory(tmp_path):
        pytest.skip("the folder for temporary files is in memory: these pages are the process's own")
    script = f"""if True:
        import mmap
        from pathlib import Path
        from crowdlayer.machine import cgroups, memory
        cgroups.ROOT = Path({str(cgroup)!r})
        before = memory.used_memory()[0]
        with open({str(tmp_path / "file")!r}, "w+b") as file:
            file.truncate(2**28)
            with mmap.mmap(file.fileno(), 0) as mapped:
                for page in range(0, 2**28, 4096):
                    mapped[page]
                of_files = memory.used_memory()[0] - before
                own = bytearray(b"x") * 2**27
                print(of_files < 2**25, 2**26 < memory.used_memory()[0] - before < 2**28)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True True\n", done.stderr


def test_what_there_is_for_the_process_is_what_it_has_and_what_is_left(cgroup: Path) -> None:
    write(cgroup, memory_dot_max=str(2**33), memory_dot_current=str(2**32))
    _, there = memory.used_memory()
    assert 2**32 < there < 2**33


def test_what_the_evaluation_takes_is_what_a_check_foresees() -> None:
    script = """if True:
        import numpy as np
        import torch
        from crowdlayer.answers import Answers
        from crowdlayer.data.dataset import CrowdImages, Dataset
        from crowdlayer.learning.crowd_layer import log_likelihood
        from crowdlayer.learning.inference import Predictions, infer, matrices_of
        from crowdlayer.machine.memory import used_memory
        rng, n_workers, n_classes = np.random.default_rng(0), 4000, 80

        def crowd(n):
            task = np.repeat(np.arange(n), 5)
            worker, label = (rng.integers(top, size=5 * n) for top in (n_workers, n_classes))
            return CrowdImages([""] * n, [""] * n, Answers(n, n_workers, task, worker, label), np.full(n, -1))

        data = Dataset("", [""] * n_classes, [""] * n_workers, crowd(180), crowd(20), None, None)
        predictions = Predictions(torch.zeros(180, n_classes), torch.zeros(20, n_classes), None)
        before, _ = used_memory()
        chosen = torch.zeros(2, n_workers, n_classes, n_classes)  # as they were trained, and as they are shown
        infer(data, predictions, log_likelihood(chosen[0], "softmax"))
        print((used_memory()[0] - before) / matrices_of(data)[1])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert 0.75 < float(done.stdout) < 1.1, done.stderr


LITTLE = """if True:
    import io, resource
    import torch
    from crowdlayer.errors import CrowdlayerError
    from crowdlayer.learning.devices import memory_for
    from crowdlayer.learning.spool import going_on
    from crowdlayer.learning.tensors import read_tensors
    from crowdlayer.machine.memory import STATUS, _kilobytes
    saved = io.BytesIO()
    torch.save(torch.zeros(60_000_000), saved)
    most = _kilobytes(STATUS)["VmData"] + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        with memory_for("the checkpoint", "give the job more memory"), going_on():
            read_tensors(saved)
    except CrowdlayerError as error:
        print(error.exit_code, error)
"""


def test_a_checkpoint_that_memory_cannot_hold_is_not_taken_for_another_programs() -> None:
    """Which would be told to begin afresh, and lose it."""
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("71 out of memory with the checkpoint: give the job more memory"), done.stderr
