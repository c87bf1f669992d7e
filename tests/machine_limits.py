"""How many cores this process may use: a container often has fewer than the machine around it."""

import os
from pathlib import Path

__all__ = ["num_usable_cores"]

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def num_usable_cores() -> int:
    """Cores that this process may run on, at least one, within its container's share of time."""
    num_cores = len(os.sched_getaffinity(0))
    try:
        quota_us, _, period_us = _CGROUP_QUOTA.read_text().strip().partition(" ")
    except OSError:
        return num_cores
    if quota_us.isdecimal() and period_us.isdecimal():
        num_cores = min(num_cores, int(quota_us) // int(period_us))
    return max(1, num_cores)
