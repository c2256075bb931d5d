"""The control groups that this process is in: their files say what it may use."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups(controller: str) -> list[Path]:
    """The folders of the group of this process and of those around it, nearest first: the limits of all of them hold.

    A container finds its own at the root; the jobs of Slurm and the services of systemd are below it. Of version 2, and
    of version 1's `controller` (memory, cpu). Files in them may be missing, and so may the folders.
    """
    found = []
    for line in lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = ROOT / controller if controllers else ROOT
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts:  # outside of what this container sees
            inside = PurePosixPath()
        found += [root / folder for folder in (inside, *inside.parents)]
    return found


def lines(path: Path) -> list[str]:
    """The lines of a file of the kernel's; none where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
