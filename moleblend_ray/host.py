"""What this process may use of its machine, and has used: CPUs and memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import Final, Literal

_STATUS: Final = Path("/proc/self/status")


def available_cpus() -> int:
    """Number of CPUs that this process may run on."""
    # Linux knows the CPU set of a process or container; other systems only know the CPUs of the machine.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
