"""A trace of a few steps beside the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import toy

from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.profile import SKIPPED_STEPS, TRACED_STEPS, trace_steps

CPU = torch.device("cpu")


def train(folder: Path, num_steps: int, start: int = 0) -> list[str]:
    """Train to step ``num_steps`` with a trace; the files that it leaves."""
    with trace_steps(str(folder), start, CPU) as after_step:
        fit(
            toy.learner(num_steps=num_steps),
            toy.steps(start=start, micro_batch_size=4),
            start_step=start,
            hooks=Hooks(after_step=after_step),
        )
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def test_a_trace_holds_the_chosen_steps_of_the_model(tmp_path: Path) -> None:
    assert train(tmp_path, num_steps=12, start=2) == ["step-00000005.json.gz", "step-00000005.txt"]
    with gzip.open(tmp_path / "profile" / "step-00000005.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == TRACED_STEPS
    optimizer = [e for e in events if "Optimizer.step" in e.get("name", "") and e.get("ph") == "X"]
    assert len({event["ts"] for event in optimizer}) == TRACED_STEPS
    assert "aten::addmm" in (tmp_path / "profile" / "step-00000005.txt").read_text()


def test_a_run_too_short_for_a_trace_leaves_none(tmp_path: Path) -> None:
    assert train(tmp_path, num_steps=SKIPPED_STEPS - 1) == []


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    assert train(tmp_path, num_steps=8) == ["profile"]
    assert "the profile could not be written" in caplog.text
