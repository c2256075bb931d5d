"""Memory, as a cgroup's files tell of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crowdlayer.errors import DeviceMemoryError
from crowdlayer.machine import memory
from tests.conftest import ROOT


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup that says nothing yet, and a host with 8 GiB."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 8388608 kB\n")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("_dot_", ".")
        path.write_text(text)


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


def test_what_the_container_has_no_memory_for_is_refused_and_not_killed(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(str(2**30))
    (tmp_path / "memory.current").write_text(str(2**30 - 2**28))
    script = f"""if True:
        from pathlib import Path
        from crowdlayer.machine import memory
        memory.CGROUP = Path({str(tmp_path)!r})
        memory.allocations_must_fit()
        bytearray(2**27)
        try:
            bytearray(2**29)
        except MemoryError:
            print("said")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "said\n", done.stderr
