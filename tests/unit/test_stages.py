"""Commands in a row are the commands that one types."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from moleblend_ray.cli import JOBS
from moleblend_ray.errors import ConfigError
from moleblend_ray.stages import Stages, StoppedError


def test_a_stage_runs_its_command_and_keeps_what_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages, out = Stages(), f"{tmp_path}/a b.parquet"
    with caplog.at_level(logging.INFO):
        summary = stages.run("few", "samples", out, f"out={out}", "num_molecules=3")
    (stage,) = stages.done.values()
    assert pq.read_metadata(out).num_rows == 3
    assert (stage.summary, stage.where) == (summary, out)
    assert stage.seconds > 0
    assert shlex.split(stage.command) == ["moleblend", "samples", f"out={out}", "num_molecules=3"]
    assert f"$ {stage.command}" in caplog.text


def test_a_command_that_fails_leaves_no_stage(tmp_path: Path) -> None:
    stages = Stages()
    with pytest.raises(ConfigError, match="num_molecules"):
        stages.run("none", "samples", "", f"out={tmp_path}/x.parquet", "num_molecules=0")
    assert stages.done == {}


def test_stages_end_with_a_command_that_was_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = SimpleNamespace(finished=False)
    job = JOBS["samples"]._replace(function=f"{__name__}:stopped")
    monkeypatch.setitem(globals(), "stopped", lambda _: stopped)
    monkeypatch.setattr("moleblend_ray.stages.JOBS", {"samples": job})
    stages = Stages()
    with pytest.raises(StoppedError, match="few: stopped by SIGTERM; the same command continues"):
        stages.run("few", "samples", "", "out=x.parquet")
    assert stages.done["few"].summary is stopped
