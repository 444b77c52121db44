"""Metrics of running jobs for Prometheus, exported by Ray's metrics agents and listed in :data:`METRICS`.

A training step only adds numbers that it has on the host anyway; a thread passes them to Ray once per second. Nothing
here waits for a device, and training does not change if nobody collects the metrics.

How they are published follows from what Ray 2.60 does with them. A gauge disappears from a node's page if it was not
set for two report intervals (20 s by default). So the thread sets all gauges repeatedly, and those of a lost process
disappear. A counter of a process that has ended stays on the page with its last value, so sums over a run remain right
when its workers restart. A counter first appears with the value that it has then, so each one starts there with 0.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, Self

from ray.util.metrics import Counter, Gauge

logger = logging.getLogger(__name__)

PREFIX: Final = "ray_"
"""Prefix that Ray puts before every name."""

PERIOD_S: Final = 1.0
"""Seconds of Ray's shortest report interval. A gauge may miss one interval."""

RUN: Final = ("run",)
RANK: Final = ("run", "rank")
STAGE: Final = ("run", "stage")


class Metric(NamedTuple):
    """A metric that is exported."""

    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    help: str
    """One line that explains it on the page."""


METRICS: Final[Mapping[str, Metric]] = {
    # Every job, from its driver.
    "moleblend_job_done_units": Metric(
        "gauge", STAGE, "Units of the stage done so far: steps, rows, molecules, trials or runs."
    ),
    "moleblend_job_target_units": Metric("gauge", STAGE, "Units that the stage has in all."),
    "moleblend_job_failed_units": Metric("gauge", STAGE, "Units of the stage that failed so far."),
    "moleblend_job_start_timestamp_seconds": Metric(
        "gauge", STAGE, "When this command began the stage, seconds since 1970."
    ),
    "moleblend_job_progress_timestamp_seconds": Metric(
        "gauge",
        STAGE,
        "When the units done, or the pieces of a shuffle, last changed, seconds since 1970.",
    ),
    # prepare, from its driver.
    "moleblend_prepare_rows_total": Metric("counter", RUN, "Source records converted."),
    "moleblend_prepare_quarantined_rows_total": Metric(
        "counter", ("run", "reason"), "Source records that went into the quarantine."
    ),
    # pretrain, from its driver.
    "moleblend_train_worker_group_starts_total": Metric(
        "counter", RUN, "Starts of all training workers together, the first included."
    ),
    "moleblend_train_recoveries_total": Metric(
        "counter", RUN, "Starts of the workers after a failure: resizes and drained nodes are none."
    ),
    # pretrain, from rank 0.
    "moleblend_train_steps_total": Metric("counter", RUN, "Optimizer steps computed."),
    "moleblend_train_molecules_total": Metric("counter", RUN, "Molecules trained on, all ranks."),
    "moleblend_train_atoms_total": Metric("counter", RUN, "Atoms trained on, all ranks."),
    "moleblend_train_atom_slots_total": Metric(
        "counter", RUN, "Places for atoms in the batches trained on, padding included, all ranks."
    ),
    "moleblend_train_model_flops_total": Metric(
        "counter", RUN, "Floating point operations that the model needs for what was trained on."
    ),
    "moleblend_train_skipped_steps_total": Metric(
        "counter", RUN, "Steps whose update was left out because it was not finite."
    ),
    "moleblend_train_anomalies_total": Metric(
        "counter", ("run", "reason"), "Steps written to anomalies/: spike or non_finite."
    ),
    "moleblend_train_step": Metric("gauge", RUN, "Steps done since the start of the run."),
    "moleblend_train_target_steps": Metric("gauge", RUN, "Steps of the whole run."),
    "moleblend_train_workers": Metric("gauge", RUN, "Training workers at work."),
    "moleblend_train_loss": Metric(
        "gauge",
        ("run", "head"),
        "Mean training loss of the steps since the last report; head total is the optimised one.",
    ),
    "moleblend_train_validation_loss": Metric(
        "gauge", ("run", "head"), "Newest validation loss; head total is the optimised one."
    ),
    "moleblend_train_learning_rate": Metric("gauge", RUN, "Learning rate of the newest step."),
    "moleblend_train_gradient_norm": Metric(
        "gauge", RUN, "Norm of the newest step's gradient, before clipping."
    ),
    "moleblend_train_mfu_ratio": Metric(
        "gauge",
        RUN,
        "Model FLOPs utilisation of the steps since the last report, against the matrix-product rate measured there.",
    ),
    "moleblend_train_matrix_flops_per_second": Metric(
        "gauge", RUN, "Matrix-product rate of all ranks' devices, as measured when training began."
    ),
    "moleblend_checkpoint_commits_total": Metric("counter", RUN, "Checkpoints committed."),
    "moleblend_checkpoint_failures_total": Metric("counter", RUN, "Saves that failed."),
    "moleblend_checkpoint_save_seconds_total": Metric(
        "counter", RUN, "Seconds that committed saves took, most of them behind training."
    ),
    "moleblend_checkpoint_wait_seconds_total": Metric(
        "counter", RUN, "Seconds that training waited for committed saves."
    ),
    "moleblend_checkpoint_step": Metric("gauge", RUN, "Step of the newest committed checkpoint."),
    "moleblend_checkpoint_interval_steps": Metric("gauge", RUN, "Steps between checkpoints."),
    "moleblend_checkpoint_timestamp_seconds": Metric(
        "gauge",
        RUN,
        "When the newest checkpoint was committed (or this command began, if later; or training, without one), seconds since 1970.",
    ),
    "moleblend_checkpoint_size_bytes": Metric("gauge", RUN, "Size of the newest checkpoint."),
    # pretrain, from every rank.
    "moleblend_train_step_seconds_total": Metric("counter", RANK, "Seconds spent in steps."),
    "moleblend_train_data_wait_seconds_total": Metric(
        "counter",
        RANK,
        "Seconds in which no step was ready on the device; part of the steps' seconds.",
    ),
    "moleblend_train_peak_memory_bytes": Metric(
        "gauge", RANK, "Most memory so far: of the allocator on a GPU, of the process on a CPU."
    ),
    # The stream of pretrain, from Ray Data's executor.
    "moleblend_stream_actors": Metric("gauge", RUN, "Data actors at work."),
    "moleblend_stream_pending_actors": Metric("gauge", RUN, "Data actors that are starting."),
    "moleblend_stream_max_actors": Metric(
        "gauge", RUN, "Data actors that the measured rates ask for at present."
    ),
    "moleblend_stream_building_blocks": Metric("gauge", RUN, "Blocks that actors are building."),
    "moleblend_stream_queued_blocks": Metric(
        "gauge", RUN, "Blocks that are built and that no trainer has taken."
    ),
    "moleblend_stream_blocks_total": Metric("counter", RUN, "Blocks built."),
    "moleblend_stream_taken_blocks_total": Metric("counter", RUN, "Blocks taken by trainers."),
    "moleblend_stream_build_seconds_total": Metric(
        "counter", RUN, "Seconds that actors spent building blocks, summed over actors."
    ),
}
"""Name without Ray's prefix -> what it is. Seconds, bytes and ratios throughout; counters end in ``_total``."""


Labels = tuple[tuple[str, str], ...]


class Publisher:
    """Passes metrics of one process to Ray's agent. Adding and setting only changes a dictionary. A context manager."""

    def __init__(
        self, *, record: Callable[[str, float, dict[str, str]], None] | None = None, **labels: str
    ) -> None:
        """``labels``: values for every metric that has such labels; ``record``: receives name, value and labels in
        place of Ray."""
        self._record = record or _record
        self._labels = labels
        self._guard = threading.Lock()
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._added: dict[tuple[str, Labels], float] = {}
        self._works = True
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10.0)
        self.publish()

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge, if the value is finite; None removes it."""
        key = self._key(name, "gauge", labels)
        with self._guard:
            if value is None:
                self._gauges.pop(key, None)
            elif math.isfinite(value):
                self._gauges[key] = float(value)

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Increase a counter; by 0, to make it appear before anything happens."""
        key = self._key(name, "counter", labels)
        if math.isfinite(value) and value >= 0:
            with self._guard:
                self._added[key] = self._added.get(key, 0.0) + value

    def publish(self) -> None:
        """Pass on what was added since the last time, and all gauges again."""
        with self._guard:
            numbers = [*self._added.items(), *self._gauges.items()]
            self._added.clear()
        if not self._works:
            return
        try:
            for (name, labels), value in numbers:
                self._record(name, value, dict(labels))
        except Exception as error:  # Whatever Ray raises: the job matters more than its metrics.
            self._works = False
            logger.warning("metrics are not published: %s: %s", type(error).__name__, error)

    def _key(self, name: str, kind: str, labels: dict[str, str]) -> tuple[str, Labels]:
        metric = METRICS[name]
        assert metric.kind == kind, name
        given = {**self._labels, **labels}
        return name, tuple((label, given[label]) for label in metric.labels)

    def _repeat(self) -> None:
        while not self._over.wait(PERIOD_S):
            self.publish()


_instruments: dict[str, Any] = {}


def _record(name: str, value: float, labels: dict[str, str]) -> None:
    """Pass one number to Ray, which exports the numbers of this process every few seconds."""
    if name not in _instruments:
        metric = METRICS[name]
        make = Counter if metric.kind == "counter" else Gauge
        _instruments[name] = make(name, description=metric.help, tag_keys=metric.labels)
    # Ray encodes labels in ASCII, and names of runs and tasks may be in any language.
    shown = {
        label: text.encode("ascii", "backslashreplace").decode() for label, text in labels.items()
    }
    # Not `inc`, which refuses 0. Without a first 0, rate() does not see a counter's first event.
    _instruments[name]._record(value, shown)


class JobMetrics:
    """Metrics of the progress of a stage, published by the driver, which outlives workers. A context manager."""

    def __init__(self, run: str, stage: str) -> None:
        """``run``: name (:func:`.logs.run_name`) of what is written; ``stage``: name of the work in the progress
        display."""
        self.publisher = Publisher(run=run, stage=stage)
        self._position: tuple[float | int | str | None, ...] = ()
        self._counts: dict[str, int] = {}
        self._expected_starts = 1
        """Starts of the workers that are no recovery and have not been seen yet: the first, and planned restarts."""

    def __enter__(self) -> Self:
        self.publisher.set("moleblend_job_start_timestamp_seconds", time.time())
        self.publisher.set("moleblend_job_progress_timestamp_seconds", time.time())
        self.publisher.set("moleblend_job_failed_units", 0)
        self.publisher.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self.publisher.__exit__(*reason)

    def show(self, values: Mapping[str, float | int | str], counts: Mapping[str, int]) -> None:
        """Publish what the progress display shows: the newest ``values``, and ``counts`` of events so far."""
        # A shuffle moves pieces for hours while the number of rows stays.
        position = tuple(values.get(name) for name in ("done", "pass", "pieces"))
        if position != self._position:
            self._position = position
            self.publisher.set("moleblend_job_progress_timestamp_seconds", time.time())
        for metric, name in (
            ("moleblend_job_done_units", "done"),
            ("moleblend_job_target_units", "total"),
            ("moleblend_job_failed_units", "failed"),
        ):
            if name in values:
                self.publisher.set(metric, float(values[name]))
        self._count_starts(counts)

    def _count_starts(self, counts: Mapping[str, int]) -> None:
        if not counts:
            return
        starts = self._new_events(counts, "worker_groups")
        # Kept from look to look: a restart is planned seconds before the workers start.
        self._expected_starts += self._new_events(counts, "planned_restarts")
        recoveries = max(0, starts - self._expected_starts)
        self._expected_starts = max(0, self._expected_starts - starts)
        self.publisher.add("moleblend_train_worker_group_starts_total", starts)
        self.publisher.add("moleblend_train_recoveries_total", recoveries)

    def _new_events(self, counts: Mapping[str, int], name: str) -> int:
        """Events since the last look. Lower than before: the actor that counts was lost and started again at 0."""
        count = counts.get(name, 0)
        before, self._counts[name] = self._counts.get(name, 0), count
        return max(0, count - before)

    def count_rows(self, rows: int, quarantined_by_reason: Mapping[str, int]) -> None:
        """Records that ``prepare`` has converted, and those of them that were rejected. Zeros, before there are any, make the
        counters appear."""
        self.publisher.add("moleblend_prepare_rows_total", rows)
        for reason, count in quarantined_by_reason.items():
            self.publisher.add("moleblend_prepare_quarantined_rows_total", count, reason=reason)
