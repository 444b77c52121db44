"""Steps whose numbers go bad: stopped at or skipped, counted, written down; losses out of line are seen."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.errors import ConfigError
from moleblend_ray.training.anomalies import (
    Anomaly,
    NotFiniteError,
    SpikeDetector,
    write_anomaly,
)
from moleblend_ray.training.config import TrainConfig
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record, last_record, write_records


def poisoned(bad_steps: tuple[int, ...]) -> Iterator[StepBatch]:
    """The toy's steps; in some, one micro-batch has coordinates that are infinite."""
    for batch in toy.steps():
        if batch.step in bad_steps:
            micro = batch.micro_batches[1]
            micro.positions[:] = np.inf
            micro.position_mask[:] = True
        yield batch


def run(
    bad_steps: tuple[int, ...], *, skipped_before: int = 0, **train: Any
) -> tuple[list[Record], list[Anomaly], dict[str, torch.Tensor]]:
    learner = toy.learner(num_steps=5, **train)
    records: list[Record] = []
    anomalies: list[Anomaly] = []
    fit(
        learner,
        poisoned(bad_steps),
        skipped_before=skipped_before,
        hooks=Hooks(report=records.append, on_anomaly=anomalies.append),
    )
    return records, anomalies, learner.model.state_dict()


def test_a_skipped_step_is_counted_named_and_leaves_the_model_as_it_was() -> None:
    records, anomalies, _ = run((4,), on_non_finite="skip")
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 0, 1]
    assert "loss" not in records[4]
    assert all(math.isfinite(value) for value in records[4].values())
    assert records[4]["molecules"] == records[3]["molecules"]
    (anomaly,) = anomalies
    assert (anomaly.step, anomaly.reason) == (4, "non_finite")
    (suspect,) = anomaly.micro_batches
    batch = next(batch for batch in toy.steps() if batch.step == 4)
    assert suspect["molecule_ids"] == batch.micro_batches[1].molecule_ids.tolist()
    # What it left is what four good steps leave.
    _, _, skipped = run((4,), on_non_finite="skip")
    learner = toy.learner(num_steps=5)
    stop_after_four = iter([False, False, False, True])
    fit(learner, toy.steps(), hooks=Hooks(should_stop=lambda: next(stop_after_four)))
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, skipped[name]), name


def test_training_goes_on_after_a_skipped_step() -> None:
    records, _, _ = run((1,), on_non_finite="skip")
    assert [("loss" in record, record["skipped_steps"]) for record in records] == [
        (True, 0),
        (False, 1),
        (True, 1),
        (True, 1),
        (True, 1),
    ]


def test_more_skipped_steps_than_allowed_end_the_run_those_before_a_restart_included() -> None:
    run((1, 3), on_non_finite="skip", max_skipped_steps=2)
    with pytest.raises(NotFiniteError, match=r"step 3: .*1 steps were skipped .* allows 1"):
        run((1, 3), on_non_finite="skip", max_skipped_steps=1)
    with pytest.raises(NotFiniteError, match=r"step 1: .*2 steps were skipped .* allows 2"):
        run((1,), on_non_finite="skip", max_skipped_steps=2, skipped_before=2)


def test_a_run_that_stops_there_tells_of_the_step_first() -> None:
    told: list[Anomaly] = []
    with pytest.raises(NotFiniteError, match=r"train\.on_non_finite=skip") as caught:
        fit(toy.learner(num_steps=5), poisoned((2,)), hooks=Hooks(on_anomaly=told.append))
    assert told == [caught.value.anomaly]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.anomaly, again.stop) == (str(caught.value), told[0], False)


def test_a_stop_that_was_asked_for_at_a_skipped_step_is_kept() -> None:
    learner = toy.learner(num_steps=5, on_non_finite="skip")
    answers = iter([False, True])
    result = fit(learner, poisoned((1,)), hooks=Hooks(should_stop=lambda: next(answers)))
    assert (result.step, result.stopped) == (2, True)


def test_an_anomaly_is_written_as_json_that_any_program_reads(tmp_path: Path) -> None:
    _, (anomaly,), _ = run((1,), on_non_finite="skip")
    uri = write_anomaly(str(tmp_path), anomaly)
    assert uri.endswith("anomalies/step-00000001-non_finite.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads(Path(uri).read_text(), parse_constant=refuse)
    assert written["step"] == 1
    assert written["micro_batches"] == [dict(micro) for micro in anomaly.micro_batches]


def test_the_count_of_skipped_steps_is_in_the_last_committed_record(tmp_path: Path) -> None:
    run_uri = str(tmp_path)
    assert last_record(run_uri, 4) == {}
    write_records(run_uri, [{"step": 2, "skipped_steps": 0}, {"step": 3, "skipped_steps": 1}], 2, 4)
    write_records(run_uri, [{"step": 4, "skipped_steps": 1}, {"step": 5, "skipped_steps": 2}], 4, 6)
    assert last_record(run_uri, 4)["skipped_steps"] == 1
    assert last_record(run_uri, 6)["skipped_steps"] == 2


def test_a_loss_far_above_the_last_ones_is_seen_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    detector = SpikeDetector(10.0)
    falling = 5.0 * np.exp(-np.arange(1000) / 400) + 0.1 * rng.normal(size=1000)
    assert [detector.update(loss) for loss in falling] == [None] * 1000
    problem = detector.update(5.0)
    assert problem is not None
    assert "loss 5 is more than 10 standard deviations" in problem
    # One report for a jump that lasts, not one a step; a single spike moves neither median nor deviation.
    assert [detector.update(5.0) for _ in range(20)] == [None] * 20
    assert detector.update(5.0) is not None
    assert detector.update(float(falling[-1])) is None


def test_the_look_out_for_spikes_waits_for_losses_and_can_be_switched_off() -> None:
    early = SpikeDetector(10.0)
    assert [early.update(loss) for loss in (1.0, 2.0, 1.0, 100.0)] == [None] * 4
    off = SpikeDetector(None)
    assert [off.update(loss) for loss in [1.0] * 100 + [1000.0]] == [None] * 101


def test_losses_that_stand_still_make_no_spike_of_a_small_rise() -> None:
    detector = SpikeDetector(10.0)
    assert [detector.update(loss) for loss in [2.0] * 60 + [2.09]] == [None] * 61
    assert detector.update(2.11) is not None


def test_a_loss_far_below_the_last_ones_is_no_spike_and_the_deviation_is_that_of_their_noise() -> (
    None
):
    rng = np.random.default_rng(0)
    detector = SpikeDetector(10.0)
    for loss in 3.0 + 0.1 * rng.normal(size=200):
        assert detector.update(loss) is None
    assert detector.update(0.5) is None
    assert detector.update(3.0 + 0.1 * 8) is None
    assert detector.update(3.0 + 0.1 * 12) is not None


def test_a_count_once_begun_stays_in_the_records_of_a_run_that_no_longer_skips() -> None:
    records, _, _ = run((), skipped_before=2)
    assert {record["skipped_steps"] for record in records} == {2}


def test_a_spike_names_all_molecules_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpikeDetector, "update", lambda self, loss: f"loss {loss} is odd")
    _, anomalies, _ = run(())
    assert [(anomaly.step, anomaly.reason) for anomaly in anomalies] == [
        (step, "spike") for step in range(5)
    ]
    named = [i for micro in anomalies[0].micro_batches for i in micro["molecule_ids"]]
    first = next(toy.steps())
    assert named == [int(i) for micro in first.micro_batches for i in micro.molecule_ids]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_skipped_steps: expected at least 1, found 0"):
        TrainConfig(max_skipped_steps=0)
    with pytest.raises(ConfigError, match="spike_deviations: expected null or more than 0"):
        TrainConfig(spike_deviations=0.0)
