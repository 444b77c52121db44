"""The memory of a process is its own, whatever process started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moleblend_ray import host
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


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in the place of the control group of a container, without a quota."""
    for name, file in (("_CPU_MAX", "max"), ("_CPU_QUOTA", "quota"), ("_CPU_PERIOD", "period")):
        monkeypatch.setattr(host, name, tmp_path / file)
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sets of CPUs")
def test_a_process_on_some_cpus_of_the_machine_counts_these(groups: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cpus() == len(before)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sets of CPUs")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"max": "200000 100000\n"}, 2),
        ({"max": "50000 100000\n"}, 1),
        ({"max": "max 100000\n"}, 64),
        ({"max": "9900000 100000\n"}, 64),
        ({"quota": "350000\n", "period": "100000\n"}, 3),
        ({"quota": "-1\n", "period": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_a_container_with_a_quota_of_cpu_time_has_that_many_cpus(
    groups: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for name, text in files.items():
        (groups / name).write_text(text)
    assert available_cpus() == expected
