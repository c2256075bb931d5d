"""How many CPUs are this job's: the share of its container or its job, not all of the machine's."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds the control group that it is in."""


def allowed() -> list[int]:
    """The numbers of the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cpus(cgroup: Path = CGROUP) -> int:
    """CPUs that this process may use at a time, at least 1: those it may run on, and no more than its quota.

    `docker run --cpus 2` and a CPU limit of Kubernetes are quotas; cpusets and Slurm's bindings are affinities.
    """
    quota, most = _quota(cgroup), len(allowed())
    return most if quota is None else max(1, min(most, round(quota)))


def _quota(cgroup: Path) -> float | None:
    """CPUs, of version 2's one file or version 1's two; None where there is no limit."""
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (cgroup / quota).read_text().split()
            words += [] if period is None else (cgroup / period).read_text().split()
            most, per = (float(word) for word in words)
        except (OSError, ValueError):  # not there; or "max", which is no limit
            continue
        if most > 0 and per > 0:  # -1 is no limit
            return most / per
    return None
