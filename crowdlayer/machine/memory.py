"""How much memory is this job's: its container's, not all of the machine's."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""The process's own, as a container sees it."""
MEMINFO = Path("/proc/meminfo")
MOUNTS = Path("/proc/self/mounts")


def free_memory() -> int:
    """Bytes of memory that the process can have without pressing anybody: the host's, or its cgroup's if fewer."""
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines(MEMINFO)}
    free = found.get("MemAvailable", 2**63 - 1)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (top := _words(limit)) and top[0].isdigit() and (now := _words(used)):
            stat = dict(line.split() for line in _lines((CGROUP / limit).with_name("memory.stat")))
            cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # is given back when asked for
            free = min(free, int(top[0]) - int(now[0]) + cache)
    return max(free, 0)


def in_memory(folder: Path) -> bool:
    """Whether the files of `folder` lie in memory (tmpfs), and count as the process's own."""
    path = folder.resolve()
    mounts = [line.split()[1:3] for line in _lines(MOUNTS)]
    around = [(len(point), kind) for point, kind in mounts if path.is_relative_to(point.replace("\\040", " "))]
    return bool(around) and sorted(around, key=lambda mount: mount[0])[-1][1] in ("tmpfs", "ramfs")


def _words(name: str) -> list[str]:
    return [word for line in _lines(CGROUP / name) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
