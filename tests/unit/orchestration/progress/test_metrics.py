"""What is exported: names by Prometheus's rules, and numbers that add up."""

from __future__ import annotations

import math
import re
import time
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from moleblend_ray.orchestration.pretraining import train_metrics
from moleblend_ray.orchestration.pretraining.train_metrics import TrainMetrics
from moleblend_ray.orchestration.progress.metrics import METRICS, JobMetrics, Publisher
from moleblend_ray.training.anomalies import Anomaly
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.saving import Save

BASE_UNITS = ("seconds", "bytes", "ratio", "timestamp_seconds", "flops_per_second")
RESERVED_LABELS = {"job", "instance", "namespace", "pod", "container", "le", "quantile"}


class Page:
    """Stands in for Ray: keeps what a scrape would show."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.calls = 0

    def __call__(self, name: str, value: float, labels: dict[str, str]) -> None:
        self.calls += 1
        assert set(labels) == set(METRICS[name].labels), name
        key = (name, tuple(sorted(labels.items())))
        if METRICS[name].kind == "counter":
            self.values[key] = self.values.get(key, 0.0) + value
        else:
            self.values[key] = value

    def of(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, tuple(sorted(labels.items()))))


def record(step: int, **changes: float) -> Record:
    numbers: Record = {
        "step": step,
        "loss": 2.0,
        "loss_spd": 3.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "molecules": 16,
        "atoms": 300,
        "padding_share": 0.25,
        "model_flops": 1e9,
        "step_s": 0.5,
        "data_wait_s": 0.1,
        "mfu": 0.4,
        "peak_memory_mib": 2.0,
    }
    return numbers | changes


@pytest.mark.parametrize("name", METRICS)
def test_names_follow_the_rules_of_prometheus(name: str) -> None:
    metric = METRICS[name]
    assert re.fullmatch(r"moleblend_[a-z][a-z0-9_]*[a-z0-9]", name)
    assert name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"_(ms|us|mib|gib|kb|mb|minutes|percent)(_|$)", name)
    assert not RESERVED_LABELS & set(metric.labels), "Prometheus would rename them"
    assert "run" in metric.labels
    assert metric.help.endswith(".")
    if "timestamp" in name or "memory" in name or "size" in name:
        assert name.endswith(BASE_UNITS)


def test_counters_add_up_and_are_seen_before_anything_happens() -> None:
    page = Page()
    publisher = Publisher(record=page, run="a", rank="0")
    told = TrainMetrics(publisher, is_first=True)
    told.start("runs/a", 0, began=0.0, target_steps=100, workers=2, interval_steps=10)
    publisher.publish()
    assert page.of("moleblend_train_steps_total", run="a") == 0.0
    assert page.of("moleblend_checkpoint_failures_total", run="a") == 0.0
    assert page.of("moleblend_train_target_steps", run="a") == 100
    for step in range(4):
        told.on_step(record(step))
    publisher.publish()
    assert page.of("moleblend_train_steps_total", run="a") == 4
    assert page.of("moleblend_train_molecules_total", run="a") == 64
    assert page.of("moleblend_train_atoms_total", run="a") == 1200
    assert page.of("moleblend_train_atom_slots_total", run="a") == pytest.approx(1600)
    assert page.of("moleblend_train_step_seconds_total", run="a", rank="0") == pytest.approx(2.0)
    wait = page.of("moleblend_train_data_wait_seconds_total", run="a", rank="0")
    assert wait == pytest.approx(0.4)
    assert page.of("moleblend_train_peak_memory_bytes", run="a", rank="0") == 2 << 20
    assert page.of("moleblend_train_step", run="a") == 4


def test_a_gauge_is_set_again_while_nothing_changes() -> None:
    # Ray forgets a gauge that was not set for a while.
    page = Page()
    publisher = Publisher(record=page, run="a")
    publisher.set("moleblend_train_workers", 2)
    for _ in range(3):
        publisher.publish()
    assert page.calls == 3
    publisher.set("moleblend_train_workers", None)
    publisher.publish()
    assert page.calls == 3


def test_losses_are_means_and_utilisation_is_weighted_by_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_metrics, "PERIOD_S", 0.0)
    page = Page()
    publisher = Publisher(record=page, run="a", rank="0")
    told = TrainMetrics(publisher, is_first=True)
    told._means_since_s = math.inf  # not yet
    monkeypatch.setattr(train_metrics, "PERIOD_S", 1.0)
    told._means_since_s = time.monotonic()
    told.on_step(record(0, loss=1.0, mfu=0.2, step_s=3.0))
    told._means_since_s -= 2.0
    told.on_step(record(1, loss=3.0, mfu=0.6, step_s=1.0))
    publisher.publish()
    assert page.of("moleblend_train_loss", run="a", head="total") == 2.0
    assert page.of("moleblend_train_loss", run="a", head="spd") == 3.0
    assert page.of("moleblend_train_mfu_ratio", run="a") == pytest.approx(0.3)
    rate = page.of("moleblend_train_matrix_flops_per_second", run="a")
    assert rate == pytest.approx(1e9 / 1.0 / 0.6)


def test_validation_skipped_steps_saves_and_anomalies_are_told() -> None:
    page = Page()
    publisher = Publisher(record=page, run="a", rank="0")
    told = TrainMetrics(publisher, is_first=True)
    told.start("runs/a", 0, began=0.0, target_steps=9, workers=1, interval_steps=2)
    told.on_step(record(0, skipped_steps=1, valid_loss=1.5, valid_loss_edge=0.5))
    told.on_step(record(1, skipped_steps=3))
    told.on_save(Save(step=2, is_committed=True, num_bytes=10, seconds=4.0, waited_s=1.0))
    told.on_save(Save(step=4, is_committed=False))
    told.on_anomaly(Anomaly(step=1, reason="spike", detail="", record={}, micro_batches=()))
    publisher.publish()
    assert page.of("moleblend_train_skipped_steps_total", run="a") == 3
    assert page.of("moleblend_train_validation_loss", run="a", head="total") == 1.5
    assert page.of("moleblend_train_validation_loss", run="a", head="edge") == 0.5
    assert page.of("moleblend_checkpoint_commits_total", run="a") == 1
    assert page.of("moleblend_checkpoint_failures_total", run="a") == 1
    assert page.of("moleblend_checkpoint_step", run="a") == 2
    assert page.of("moleblend_checkpoint_wait_seconds_total", run="a") == 1.0
    age_s = time.time() - (page.of("moleblend_checkpoint_timestamp_seconds", run="a") or 0.0)
    assert 0 <= age_s < 60
    assert page.of("moleblend_train_anomalies_total", run="a", reason="spike") == 1


@pytest.mark.parametrize(
    ("committed", "began", "since"),
    [
        # A restart within a command: the work since the checkpoint would be lost again.
        ("2026-01-02T10:00:00+00:00", "2026-01-02T08:00:00+00:00", "2026-01-02T10:00:00+00:00"),
        # A run that waited in a queue for a day has nothing to lose, and nobody is to be woken.
        ("2026-01-02T10:00:00+00:00", "2026-01-03T09:00:00+00:00", "2026-01-03T09:00:00+00:00"),
    ],
)
def test_the_time_between_two_commands_is_no_work_at_risk(
    committed: str, began: str, since: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = SimpleNamespace(created=committed)
    monkeypatch.setattr(train_metrics, "read_commit", lambda *_: commit)
    page = Page()
    publisher = Publisher(record=page, run="a", rank="0")
    TrainMetrics(publisher, is_first=True).start(
        "runs/a",
        40,
        began=datetime.fromisoformat(began).timestamp(),
        target_steps=90,
        workers=1,
        interval_steps=20,
    )
    publisher.publish()
    found = page.of("moleblend_checkpoint_timestamp_seconds", run="a")
    assert found == datetime.fromisoformat(since).timestamp()


def test_steps_skipped_before_a_restart_are_not_counted_again() -> None:
    page = Page()
    publisher = Publisher(record=page, run="a", rank="0")
    told = TrainMetrics(publisher, is_first=True)
    told.start("nowhere/a", 50, began=0.0, target_steps=90, workers=1, interval_steps=2)
    told.on_step(record(50, skipped_steps=7))
    told.on_step(record(51, skipped_steps=8))
    publisher.publish()
    assert page.of("moleblend_train_skipped_steps_total", run="a") == 1


def test_other_ranks_tell_of_their_own_time_and_memory_only() -> None:
    page = Page()
    publisher = Publisher(record=page, run="a", rank="3")
    told = TrainMetrics(publisher, is_first=False)
    told.start("runs/a", 0, began=0.0, target_steps=9, workers=4, interval_steps=2)
    told.on_step(record(0))
    told.on_save(Save(step=2, is_committed=True))
    publisher.publish()
    assert {name for name, _ in page.values} == {
        "moleblend_train_step_seconds_total",
        "moleblend_train_data_wait_seconds_total",
        "moleblend_train_peak_memory_bytes",
    }


def test_numbers_that_are_none_do_not_reach_the_page() -> None:
    page = Page()
    publisher = Publisher(record=page, run="a", rank="0")
    told = TrainMetrics(publisher, is_first=True)
    told.on_step(record(0, loss=math.nan, grad_norm=math.inf))
    publisher.publish()
    assert page.of("moleblend_train_steps_total", run="a") == 1
    assert all(math.isfinite(value) for value in page.values.values())
    assert page.of("moleblend_train_gradient_norm", run="a") is None


def test_metrics_that_fail_are_given_up_once_and_harm_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no agent")

    publisher = Publisher(record=fail, run="a")
    for _ in range(3):
        publisher.set("moleblend_train_workers", 1)
        publisher.publish()
    assert caplog.text.count("metrics are not published: RuntimeError: no agent") == 1


def test_names_of_runs_in_any_language_are_published(caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(run="Müller/µ-Opioid")
    publisher.add("moleblend_train_steps_total", 0)
    publisher.publish()
    assert "metrics are not published" not in caplog.text


def test_a_name_that_is_not_declared_is_our_own_mistake() -> None:
    with pytest.raises(KeyError):
        Publisher(run="a").set("moleblend_train_wrokers", 1)


def job(page: Page) -> JobMetrics:
    told = JobMetrics("a", "pretrain")
    told.publisher = Publisher(record=page, run="a", stage="pretrain")
    return told


def test_progress_is_when_something_was_done_not_when_it_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, now = Page(), [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    told = job(page)
    told.show({"done": 3, "total": 9}, {})
    now[0] = 1500.0
    told.show({"done": 3, "total": 9, "loss": 1.0}, {})
    told.publisher.publish()
    where = {"run": "a", "stage": "pretrain"}
    assert page.of("moleblend_job_progress_timestamp_seconds", **where) == 1000.0
    assert page.of("moleblend_job_done_units", **where) == 3
    now[0] = 1600.0
    told.show({"done": 4, "total": 9}, {})
    told.publisher.publish()
    assert page.of("moleblend_job_progress_timestamp_seconds", **where) == 1600.0


def test_the_pieces_of_a_shuffle_are_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    page, now = Page(), [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    told = job(page)
    for second, shown in (
        (1000, ("place", "1/9")),
        (1100, ("place", "2/9")),
        (1200, ("sort", "2/9")),
        (1300, ("sort", "2/9")),
    ):
        now[0] = float(second)
        told.show({"done": 3, "pass": shown[0], "pieces": shown[1]}, {})
    told.publisher.publish()
    where = {"run": "a", "stage": "pretrain"}
    assert page.of("moleblend_job_progress_timestamp_seconds", **where) == 1200.0


@pytest.mark.parametrize(
    ("counts", "starts", "recoveries"),
    [
        ([{}], None, None),
        ([{"worker_groups": 1}], 1, 0),
        ([{"worker_groups": 1}, {"worker_groups": 3}], 3, 2),
        ([{"worker_groups": 3, "planned_restarts": 2}], 3, 0),
        # A failure, then two drained nodes: a restart is seen as planned before the workers start.
        (
            [
                {"worker_groups": 1},
                {"worker_groups": 2},
                {"worker_groups": 2, "planned_restarts": 1},
                {"worker_groups": 3, "planned_restarts": 1},
                {"worker_groups": 3, "planned_restarts": 2},
                {"worker_groups": 4, "planned_restarts": 2},
            ],
            4,
            1,
        ),
        # The actor that counts was lost with its node.
        ([{"worker_groups": 3}, {"worker_groups": 1}, {"worker_groups": 2}], 4, 3),
    ],
)
def test_recoveries_are_starts_that_nobody_asked_for(
    counts: list[dict[str, int]], starts: int | None, recoveries: int | None
) -> None:
    page = Page()
    told = job(page)
    for seen in counts:
        told.show({}, seen)
    told.publisher.publish()
    assert page.of("moleblend_train_worker_group_starts_total", run="a") == starts
    assert page.of("moleblend_train_recoveries_total", run="a") == recoveries


def test_quarantined_rows_are_counted_by_reason() -> None:
    page = Page()
    told = job(page)
    told.count_rows(100, {"parse_error": 3})
    told.count_rows(50, {"parse_error": 1, "too_large": 2})
    told.publisher.publish()
    assert page.of("moleblend_prepare_rows_total", run="a") == 150
    quarantined = "moleblend_prepare_quarantined_rows_total"
    assert page.of(quarantined, run="a", reason="parse_error") == 4
    assert page.of(quarantined, run="a", reason="too_large") == 2


def test_a_step_costs_a_fraction_of_a_millisecond() -> None:
    told: Any = TrainMetrics(Publisher(record=Page(), run="a", rank="0"), is_first=True)
    best_s = math.inf
    for _ in range(5):
        began_s = time.perf_counter()
        for step in range(50):
            told.on_step(record(step))
        best_s = min(best_s, (time.perf_counter() - began_s) / 50)
    assert best_s < 5e-4
