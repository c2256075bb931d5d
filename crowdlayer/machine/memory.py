"""How much memory is this job's: its container's, not all of the machine's."""

from __future__ import annotations

import resource
from pathlib import Path

from ..errors import DeviceMemoryError

CGROUP = Path("/sys/fs/cgroup")
"""The process's own, as a container sees it."""
MEMINFO = Path("/proc/meminfo")
MOUNTS = Path("/proc/self/mounts")
STATUS = Path("/proc/self/status")
TO_START = 512 * 2**20
"""Bytes that a container must allow: torch and the other libraries take nearly as many before they do anything."""


def free_memory() -> int:
    """Bytes of memory that the process can have without pressing anybody: the host's, or its cgroup's if fewer."""
    free = _kilobytes(MEMINFO).get("MemAvailable", 2**63 - 1)
    limited = _within_limit()
    return max(free if limited is None else min(free, limited[1]), 0)


def _within_limit() -> tuple[int, int] | None:
    """The bytes that the cgroup allows, and how many are left of them; None where it sets no limit.

    What it holds of files is given back when asked for, and counts as left.
    """
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (top := _words(limit)) and top[0].isdigit() and (now := _words(used)):
            stat = dict(line.split() for line in _lines((CGROUP / limit).with_name("memory.stat")))
            cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            return int(top[0]), int(top[0]) - int(now[0]) + cache
    return None


def enough_to_start() -> None:
    """Refuse a container too small for the libraries: the kernel would kill the process without a word.

    Raises:
        DeviceMemoryError: with what is needed.
    """
    limited = _within_limit()
    if limited is not None and limited[0] < TO_START:
        raise DeviceMemoryError(
            f"out of memory: the container's limit must be at least {TO_START / 1e6:.0f} MB for the libraries alone, "
            f"it is {limited[0] / 1e6:.0f} MB"
        )


def allocations_must_fit() -> None:
    """From now on refuse this process what its container has no memory for, so that it can say so.

    Else it would get the memory and be killed without a word when it uses it. Where there is no limit nothing is done.
    """
    limited = _within_limit()
    if limited is not None and limited[1] <= _kilobytes(MEMINFO).get("MemAvailable", 2**63 - 1):
        most = _kilobytes(STATUS)["VmData"] + max(limited[1], 0)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def in_memory(folder: Path) -> bool:
    """Whether the files of `folder` lie in memory (tmpfs), and count as the process's own."""
    path = folder.resolve()
    mounts = [line.split()[1:3] for line in _lines(MOUNTS)]
    around = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point.replace("\\040", " "))]
    return bool(around) and sorted(around, key=lambda mount: mount[0])[-1][1] in ("tmpfs", "ramfs")


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, in bytes."""
    lines = (line.split() for line in _lines(path) if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def _words(name: str) -> list[str]:
    return [word for line in _lines(CGROUP / name) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
