"""Jobs handed to a cluster as it is elsewhere: the reduced form of `make cluster-test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "cluster_test.py"
TIMEOUT_S = 900


def run(*options: str) -> Any:
    """The report of the script."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *options],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_without_authentication_takes_jobs_with_and_without_a_token() -> None:
    # Two by `moleblend submit`, one by `ray job submit`.
    assert run("--without-token")["jobs"] == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_stopped_on_a_cluster_behind_a_token_is_continued_by_the_same_command(
    s3_endpoint: None,
) -> None:
    report = run("--quick", "--molecules=150", "--steps=90")
    assert report["rows_in"] == 150
    assert report["steps"] == 90
    assert 9 < report["stopped_at"] < 90
    assert report["placed"] == 3
    assert report["refused"] == 4
    # prepare, and pretraining twice
    assert report["jobs"] == 3
