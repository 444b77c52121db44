"""`moleblend` as a user runs it: a command in a process of its own, which may be killed at a chosen moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 240.0
"""For a command, or for the moment to kill it, on a busy machine."""

_MAIN = """
import sys
from moleblend_ray.cli import main

sys.exit(main())
"""


def moleblend(*arguments: str, work: Path | None = None, before: str = "") -> subprocess.Popen[str]:
    """Start `moleblend ARGUMENTS` in the folder ``work``; ``before`` is code that its process runs first."""
    return subprocess.Popen(
        [sys.executable, "-c", before + _MAIN, *arguments],
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a command that must end well."""
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors[-3000:]


def kill_when(
    seen: Callable[[], bool],
    process: subprocess.Popen[str],
    *,
    whole_group: bool = False,
    interval_s: float = 0.002,
) -> None:
    """SIGKILL for the command as soon as ``seen``: it alone, or with all its children that are still in its group.

    Alone is what a `kill -9` or a lack of memory does: its other processes may go on for a moment, and are not
    waited for here.
    """
    deadline = time.monotonic() + LIMIT_S
    while not seen():
        if process.poll() is not None:
            errors = process.communicate()[1]
            raise AssertionError(f"it ended before the moment to kill it: {errors[-3000:]}")
        assert time.monotonic() < deadline, "the moment to kill it did not come"
        time.sleep(interval_s)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
