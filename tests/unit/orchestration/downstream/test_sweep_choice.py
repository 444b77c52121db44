"""A sweep ends with the settings of the trial that was best on validation."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from moleblend_ray.config.downstream import SweepConfig, TaskConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import TrainingError
from moleblend_ray.evaluation.results.results import TrialResult
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import TASKS
from moleblend_ray.orchestration.downstream.sweep import choose, known_trials, warn_of_searched

FIXED = FinetuneSettings(clip_norm=7.0)


def trial(number: int, score: float | None, error: str | None = None) -> TrialResult:
    return TrialResult(
        number=number,
        status="finished" if error is None else "failed",
        settings={"batch_size": 2**number},
        valid_score=score,
        epochs=1,
        seconds=1.0,
        error=error,
    )


def test_the_best_trial_is_chosen_by_the_metric_and_the_earlier_one_of_equals() -> None:
    trials = [trial(3, 0.9), trial(1, 0.9), trial(2, 0.4), trial(4, 0.4), trial(0, None, "killed")]
    assert choose(FIXED, TASKS["bbbp"], trials).batch_size == 2**1
    assert choose(FIXED, TASKS["esol"], trials).batch_size == 2**2
    assert choose(FIXED, TASKS["esol"], trials).clip_norm == 7.0


def test_a_search_without_any_score_says_why_its_trials_failed() -> None:
    trials = [trial(0, None, "out of memory"), trial(1, None, "out of memory"), trial(2, None)]
    with pytest.raises(TrainingError, match=r"none of 3 trials .*: out of memory; no score$"):
        choose(FIXED, TASKS["esol"], trials)


def test_a_setting_that_the_search_varies_is_named_if_it_was_given(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = TaskConfig(name="esol", source="a.csv")
    given = FinetuneSettings(epochs=3, patience=2, learning_rate=5e-4)
    config = SweepConfig(task=task, out="b", finetune=given)
    with caplog.at_level(logging.WARNING):
        warn_of_searched(config)
        assert [message.split("=")[0] for message in caplog.messages] == [
            "finetune.learning_rate",
            "finetune.epochs",
        ]
        caplog.clear()
        fixed = SearchSpace(learning_rate=None, epochs=(3, 3))
        warn_of_searched(dataclasses.replace(config, search=fixed, finetune=FinetuneSettings()))
    assert caplog.messages == []


def test_the_trials_of_finished_results_are_known_and_those_from_scratch_by_their_scores(
    tmp_path: Path,
) -> None:
    out, scratch = str(tmp_path), str(tmp_path / "scratch")
    assert known_trials(out) == known_trials(scratch) == []
    trials = [trial(0, 0.5), trial(1, None)]
    candidates = [{"settings": {"learning_rate": 1e-4}, "valid_score": 0.25}]
    baselines = [
        {"kind": "forest", "candidates": []},
        {"kind": "scratch", "candidates": candidates},
    ]
    results = {"trials": [dataclasses.asdict(one) for one in trials], "baselines": baselines}
    storage.write_json(str(tmp_path / "results.json"), results)
    assert known_trials(out) == trials
    (found,) = known_trials(scratch)
    assert (found.settings, found.valid_score) == ({"learning_rate": 1e-4}, 0.25)
    # A baseline from scratch that is being added has no search yet.
    storage.write_json(str(tmp_path / "results.json"), {**results, "baselines": baselines[:1]})
    assert known_trials(scratch) == []
    assert known_trials(str(tmp_path / "other")) == []
