"""The memory of a process is its own, whatever process started it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from moleblend_ray.host import available_cpus, peak_memory_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no /proc")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    program = "from moleblend_ray.host import peak_memory_bytes; print(peak_memory_bytes())"
    held = np.ones(500 << 20, np.uint8)
    assert peak_memory_bytes() > held.nbytes
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 1 << 20 < int(done.stdout) < held.nbytes // 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sets of CPUs")
def test_a_process_on_some_cpus_of_the_machine_counts_these() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cpus() == len(before)
