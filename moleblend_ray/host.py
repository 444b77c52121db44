"""What this process may use of its machine, and has used: CPUs and memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import Final, Literal

_STATUS: Final = Path("/proc/self/status")
# What a container sees of its own control group (2, or else 1): microseconds of CPU time for each period of microseconds.
_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
_CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CPU_PERIOD: Final = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def available_cpus() -> int:
    """Number of CPUs that this process may use: those that it may run on, or fewer where a container has a quota."""
    # Linux knows the CPU set of a process or container; other systems only know the CPUs of the machine.
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    return cpus if quota is None else min(cpus, max(1, int(quota)))


def _cpu_quota() -> float | None:
    """CPUs' worth of time that the container may use (``docker run --cpus``, limits of Kubernetes); None: no quota."""
    try:
        if _CPU_MAX.exists():
            quota, period = _CPU_MAX.read_text().split()
        else:
            quota, period = _CPU_QUOTA.read_text(), _CPU_PERIOD.read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no control groups, or "max"
        return None


def peak_memory_bytes() -> int:
    """Most memory that this process has had at once, the libraries that it shares with others included."""
    # Where there is no /proc: getrusage includes the parent, as it was when it started this process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return status_bytes("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def status_bytes(name: Literal["VmHWM", "VmData"]) -> int:
    """Peak memory (``VmHWM``) or data (``VmData``) of this process by /proc, in bytes; 0 where there is none."""
    try:
        status = _STATUS.read_text()
    except FileNotFoundError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
