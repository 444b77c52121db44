"""The rate of a conversion counts the time when all processes were at work, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from moleblend_ray.orchestration.conversion import Effort


def result(process: str | None, started_s: float, ended_s: float, peak: int = 0) -> dict[str, Any]:
    return {"process": process, "started_s": started_s, "ended_s": ended_s, "peak_bytes": peak}


def test_a_late_process_and_a_last_chunk_do_not_count() -> None:
    effort = Effort()
    # a: 0-2, 2-4, 4-6; b: 1-3, 3-5. Together from 1 to 5, each 10 records in 2 s.
    for process, started_s in (("a", 0.0), ("a", 2.0), ("a", 4.0), ("b", 1.0), ("b", 3.0)):
        effort.add(10, result(process, started_s, started_s + 2.0, peak=int(started_s)))
    assert effort.rows_per_s == pytest.approx(10.0)
    assert effort.seconds == pytest.approx(6.0)
    assert effort.peak_bytes == 4


def test_chunks_of_a_former_run_took_no_time() -> None:
    effort = Effort()
    effort.add(10, result(None, 0.0, 0.0))
    assert (effort.rows_per_s, effort.seconds, effort.peak_bytes) == (0.0, 0.0, 0)


def test_processes_that_never_met_have_no_common_rate() -> None:
    effort = Effort()
    effort.add(10, result("a", 0.0, 1.0))
    effort.add(10, result("b", 2.0, 3.0))
    assert effort.rows_per_s == 0.0
    assert effort.seconds == 3.0
