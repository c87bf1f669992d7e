"""How much of a machine this process may use: a container often has less than the machine around it."""

import os
from pathlib import Path

__all__ = ["num_usable_bytes", "num_usable_cores"]

_CGROUP = Path("/sys/fs/cgroup")


def num_usable_cores() -> int:
    """Cores that this process may run on, at least one, within its container's share of time."""
    num_cores = len(os.sched_getaffinity(0))
    quota_us, _, period_us = _limit("cpu.max").partition(" ")
    if quota_us.isdecimal() and period_us.isdecimal():
        num_cores = min(num_cores, int(quota_us) // int(period_us))
    return max(1, num_cores)


def num_usable_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's."""
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _limit("memory.max")
    return min(num_bytes, int(limit)) if limit.isdecimal() else num_bytes


def _limit(name: str) -> str:
    """What a control group says; empty where there is none, as outside of containers."""
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""
