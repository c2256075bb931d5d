"""How many CPUs are this job's: the share of its container or its job, not all of the machine's."""

from __future__ import annotations

import os
from collections.abc import Iterator

from .cgroups import groups, lines


def allowed() -> list[int]:
    """The numbers of the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cpus() -> int:
    """CPUs that this process may use at a time, at least 1: those it may run on, and no more than its quota,
    to the nearest whole one.

    `docker run --cpus 2` and a CPU limit of Kubernetes are quotas; cpusets and Slurm's bindings are affinities.
    """
    return max(1, min([len(allowed()), *(round(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """CPUs, of each cgroup around this process that has a limit: version 2's one file or version 1's two."""
    for group in groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            words = [word for file in files for line in lines(group / file) for word in line.split()]
            try:
                most, per = (float(word) for word in words)
            except ValueError:  # not there; or "max", which is no limit
                continue
            if most > 0 and per > 0:  # -1 is no limit
                yield most / per
