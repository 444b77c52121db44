"""Metrics of the ranks of a pretraining run (see :mod:`~moleblend_ray.orchestration.progress.metrics`)."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from datetime import datetime
from typing import Final

from moleblend_ray.errors import MoleBlendError
from moleblend_ray.orchestration.progress.metrics import PERIOD_S, Publisher
from moleblend_ray.training.anomalies import Anomaly
from moleblend_ray.training.commits import read_commit
from moleblend_ray.training.metrics import TOTAL_LOSS, VALID_PREFIX, Record, is_loss
from moleblend_ray.training.saving import Save

_COUNTERS: Final = (
    "moleblend_train_steps_total",
    "moleblend_train_molecules_total",
    "moleblend_train_atoms_total",
    "moleblend_train_atom_slots_total",
    "moleblend_train_model_flops_total",
    "moleblend_train_skipped_steps_total",
    "moleblend_checkpoint_commits_total",
    "moleblend_checkpoint_failures_total",
    "moleblend_checkpoint_save_seconds_total",
    "moleblend_checkpoint_wait_seconds_total",
)
"""Counters of rank 0, which appear before anything has happened."""


class TrainMetrics:
    """Publishes the metrics of one rank. Its methods are the callables that training accepts."""

    def __init__(self, publisher: Publisher, *, is_first: bool) -> None:
        self._publisher = publisher
        self._is_first = is_first
        self._means: dict[str, tuple[float, float]] = {}
        self._means_since_s = time.monotonic()
        self._skipped = -1

    def start(
        self,
        run_uri: str,
        step: int,
        *,
        began: float,
        target_steps: int,
        workers: int,
        interval_steps: int,
    ) -> None:
        """Publish where a worker group starts. Only rank 0 does so.

        ``began``: when this command began, seconds since 1970.
        """
        if not self._is_first:
            return
        if step == 0:
            self._skipped = 0
        publisher = self._publisher
        for name in _COUNTERS:
            publisher.add(name, 0.0)
        for reason in ("spike", "non_finite"):
            publisher.add("moleblend_train_anomalies_total", 0.0, reason=reason)
        publisher.set("moleblend_train_step", step)
        publisher.set("moleblend_train_target_steps", target_steps)
        publisher.set("moleblend_train_workers", workers)
        publisher.set("moleblend_checkpoint_interval_steps", interval_steps)
        publisher.set("moleblend_checkpoint_step", step)
        publisher.set("moleblend_checkpoint_timestamp_seconds", _safe_since(run_uri, step, began))

    def on_step(self, record: Record) -> None:
        """Add the numbers of a step, which are on the host already."""
        publisher = self._publisher
        step_s = float(record["step_s"])
        publisher.add("moleblend_train_step_seconds_total", step_s)
        publisher.add("moleblend_train_data_wait_seconds_total", float(record["data_wait_s"]))
        publisher.set("moleblend_train_peak_memory_bytes", float(record["peak_memory_mib"]) * 2**20)
        if self._is_first:
            self._add_totals(record)
            self._add_means(record, step_s)

    def on_save(self, save: Save) -> None:
        """Publish that a checkpoint was committed, or failed."""
        if not self._is_first:
            return
        publisher = self._publisher
        if not save.is_committed:
            publisher.add("moleblend_checkpoint_failures_total")
            return
        publisher.add("moleblend_checkpoint_commits_total")
        publisher.add("moleblend_checkpoint_save_seconds_total", save.seconds)
        publisher.add("moleblend_checkpoint_wait_seconds_total", save.waited_s)
        publisher.set("moleblend_checkpoint_step", save.step)
        publisher.set("moleblend_checkpoint_size_bytes", save.num_bytes)
        publisher.set("moleblend_checkpoint_timestamp_seconds", time.time())

    def on_anomaly(self, anomaly: Anomaly) -> None:
        """Count a step whose numbers were bad."""
        if self._is_first:
            self._publisher.add("moleblend_train_anomalies_total", reason=anomaly.reason)

    def _add_totals(self, record: Record) -> None:
        publisher = self._publisher
        atoms = float(record["atoms"])
        publisher.add("moleblend_train_steps_total")
        publisher.add("moleblend_train_molecules_total", float(record["molecules"]))
        publisher.add("moleblend_train_atoms_total", atoms)
        publisher.add(
            "moleblend_train_atom_slots_total", atoms / (1.0 - float(record["padding_share"]))
        )
        publisher.add("moleblend_train_model_flops_total", float(record["model_flops"]))
        publisher.set("moleblend_train_step", record["step"] + 1)
        publisher.set("moleblend_train_learning_rate", float(record["learning_rate"]))
        publisher.set("moleblend_train_gradient_norm", record.get("grad_norm"))
        skipped = int(record.get("skipped_steps", 0))
        if skipped > self._skipped >= 0:
            publisher.add("moleblend_train_skipped_steps_total", skipped - self._skipped)
        self._skipped = skipped
        for name, value in record.items():
            if name.startswith(VALID_PREFIX + TOTAL_LOSS):
                head = _head(name.removeprefix(VALID_PREFIX))
                publisher.set("moleblend_train_validation_loss", float(value), head=head)

    def _add_means(self, record: Record, step_s: float) -> None:
        """Publish means over about a second: every 15 s the page is read, and single steps of a fast run are noise."""
        for name, value in record.items():
            if is_loss(name):
                self._add_mean(name, float(value), 1.0)
        mfu = float(record["mfu"])
        self._add_mean("mfu", mfu, step_s)
        if mfu > 0:
            rate = float(record["model_flops"]) / step_s / mfu
            self._publisher.set("moleblend_train_matrix_flops_per_second", rate)
        now_s = time.monotonic()
        if now_s - self._means_since_s < PERIOD_S:
            return
        self._means_since_s = now_s
        for name, (total, weight) in self._means.items():
            if name == "mfu":
                self._publisher.set("moleblend_train_mfu_ratio", total / weight)
            else:
                self._publisher.set("moleblend_train_loss", total / weight, head=_head(name))
        self._means.clear()

    def _add_mean(self, name: str, value: float, weight: float) -> None:
        if math.isfinite(value):
            total, weights = self._means.get(name, (0.0, 0.0))
            self._means[name] = (total + value * weight, weights + weight)


def _head(loss: str) -> str:
    """Label of the loss that a record calls ``loss`` (the optimised one) or ``loss_<head>``."""
    return loss.removeprefix(TOTAL_LOSS).removeprefix("_") or "total"


def _safe_since(run_uri: str, step: int, began: float) -> float:
    """When the checkpoint of ``step`` was committed, or this command ``began`` if that was later: a run that was stopped
    for a day has not a day of work to lose. The present time if there is none or its marker is unreadable."""
    if step > 0:
        with suppress(MoleBlendError, ValueError):
            committed = datetime.fromisoformat(read_commit(run_uri, step).created).timestamp()
            return max(committed, began)
    return time.time()
