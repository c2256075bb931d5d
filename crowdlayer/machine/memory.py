"""How much memory is this job's: its container's, not all of the machine's."""

from __future__ import annotations

import resource
from pathlib import Path

from ..errors import DeviceMemoryError, one_line
from .cgroups import groups, lines

MEMINFO = Path("/proc/meminfo")
MOUNTS = Path("/proc/self/mounts")
STATUS = Path("/proc/self/status")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""The files of a cgroup of version 2 and of version 1: what it may have, and what it has."""
FILES = ("inactive_file", "active_file")
"""What memory.stat calls the pages that hold files."""
STACK, OTHER_THREADS = 8 * 2**20, 8
"""Bytes of a thread's stack where the system sets none; the threads of a run beside those that compute."""
TO_START = 512 * 2**20
"""Bytes that a container must allow: torch and the other libraries take nearly as many before they do anything."""


def free_memory() -> int:
    """Bytes of memory that the process can have without pressing anybody: the host's, or its cgroup's if fewer."""
    return max(min([_available(), *(left for _, left in _limits())]), 0)


def _available() -> int:
    """Bytes that the host can give."""
    return _kilobytes(MEMINFO).get("MemAvailable", 2**63 - 1)


def _limits() -> list[tuple[int, int]]:
    """The bytes that each cgroup around this process allows, and how many are left of them.

    What it holds of files is given back when asked for, and counts as left.
    """
    found = []
    for group in groups("memory"):
        for limit, used in LIMITS:
            if (top := _words(group / limit)) and top[0].isdigit() and (now := _words(group / used)):
                stat = dict(line.split() for line in lines(group / "memory.stat"))
                # of version 1 those in groups below are in the totals alone
                cache = sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in FILES)
                found.append((int(top[0]), int(top[0]) - int(now[0]) + cache))
    return found


def used_memory() -> tuple[int, int]:
    """The most bytes of its own that the process has had so far, and how many there are for it.

    The pages of files that it has mapped, libraries and images, are not its own: they are given back when asked for.
    """
    status = _kilobytes(STATUS)
    now = status.get("RssAnon", 0) + status.get("RssShmem", 0)
    most = status.get("VmHWM", 0) - status.get("RssFile", 0)  # getrusage's would be the starting process's, if larger
    return max(most, now), now + free_memory()


def too_little(error: MemoryError) -> str:
    """What an allocation has failed for: Python itself says nothing of it."""
    used, there = used_memory()
    return f"out of memory: {one_line(str(error)) or f'{used / 1e6:.0f} of {there / 1e6:.0f} MB were used'}"


def enough_to_start() -> None:
    """Refuse a container too small for the libraries: the kernel would kill the process without a word.

    Raises:
        DeviceMemoryError: with what is needed.
    """
    allowed = min((limit for limit, _ in _limits()), default=TO_START)
    if allowed < TO_START:
        raise DeviceMemoryError(
            f"out of memory: the container's limit must be at least {TO_START / 1e6:.0f} MB for the libraries alone, "
            f"it is {allowed / 1e6:.0f} MB"
        )


def allocations_must_fit(threads: int) -> None:
    """From now on refuse this process what its container has no memory for, so that it can say so.

    Else it would get the memory and be killed without a word when it uses it. Where there is no limit nothing is done.
    The bound is one of addresses, of which the stacks of threads that are still to come take many and use few.

    Args:
        threads: those that will compute.
    """
    left = min((left for _, left in _limits()), default=None)
    if left is not None and left <= _available():
        stack, hard = resource.getrlimit(resource.RLIMIT_STACK)[0], resource.getrlimit(resource.RLIMIT_DATA)[1]
        stacks = (STACK if stack == resource.RLIM_INFINITY else stack) * (threads + OTHER_THREADS)
        most = _kilobytes(STATUS)["VmData"] + max(left, 0) + stacks
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def in_memory(folder: Path) -> bool:
    """Whether the files of `folder` lie in memory (tmpfs), and count as the process's own."""
    path = folder.resolve()
    mounts = [line.split()[1:3] for line in lines(MOUNTS)]
    around = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point.replace("\\040", " "))]
    return bool(around) and sorted(around, key=lambda mount: mount[0])[-1][1] in ("tmpfs", "ramfs")


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, in bytes."""
    said = (line.split() for line in lines(path) if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in said}


def _words(path: Path) -> list[str]:
    return [word for line in lines(path) for word in line.split()]
