"""How a pretraining run is doing, from its files alone: nothing is asked of Ray, and little is read.

Files tell what was committed, when, and what is due. They do not tell whether a process lives: a run whose next
checkpoint is overdue was killed, or hangs, or waits for machines.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import member
from moleblend_ray.errors import HIDDEN, DataError, StorageError
from moleblend_ray.quantities import duration_text
from moleblend_ray.training.anomalies import ANOMALIES_DIR
from moleblend_ray.training.commits import (
    FINISHED_NAME,
    Commit,
    examine_checkpoints,
)
from moleblend_ray.training.curves import (
    WINDOW,
    LossStatus,
    loss_curve,
    loss_status,
    mean_rates,
    newest_records,
    newest_validations,
)
from moleblend_ray.training.metrics import Record, record_files

logger = logging.getLogger(__name__)

_LARGEST_MANIFEST: Final = 32 << 20
_OVERDUE_INTERVALS: Final = 2.0
_OVERDUE_S: Final = 180.0
"""A checkpoint is overdue after so many intervals and so many seconds: a worker group that starts anew takes its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointStatus:
    """One checkpoint."""

    step: int
    state: str
    """``whole``, ``damaged``, ``newer`` (of a newer version) or ``incomplete`` (without a marker)."""
    created: str
    """UTC time, ISO 8601; empty without a marker."""
    num_bytes: int
    workers: int
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """A pretraining run. What is not known is None."""

    kind: str
    uri: str
    state: str
    """``finished``, ``running``, ``stopped``, ``stalled``, ``started`` or ``damaged``; ``detail`` says what that is taken from."""
    detail: str
    step: int
    """Committed steps."""
    num_steps: int | None
    last_commit: str | None
    """UTC time of the newest marker, ISO 8601."""
    age_s: float | None
    """Seconds since then."""
    expected_interval_s: float | None
    """Seconds between checkpoints, by the settings and the time of a step."""
    eta_s: float | None
    """Seconds that the remaining steps take, if they go on as the last ones did."""
    seconds_a_step: float | None
    """Between the two newest checkpoints of one worker group, else by the records."""
    workers: int | None
    window: int
    """Steps that the following means are over."""
    rates: Mapping[str, float]
    """Means of molecules_per_s, atoms_per_s, mfu, data_wait_share, padding_share; newest peak_memory_mib, learning_rate,
    grad_norm."""
    losses: tuple[LossStatus, ...]
    curve: tuple[float, ...]
    """The optimised loss at points of the run, oldest first."""
    validation: tuple[tuple[int, float], ...]
    """Step and loss of the newest validations on file, oldest first."""
    skipped_steps: int
    anomalies: int
    """Files that tell of bad steps."""
    worker_groups: int
    """Distinct ones among the checkpoints kept: one more than the restarts seen, and restarts before those are not seen."""
    checkpoints: tuple[CheckpointStatus, ...]
    """Newest first."""
    data: Mapping[str, Any]
    """uri, fingerprint; and, if its manifest could be read: molecules, quarantined, rows_in, epochs (presentations over
    molecules), else perhaps a problem."""
    settings: Mapping[str, Any]
    """Some of the run's settings, for reading: seed, strategy, precision, global_batch_size, num_layers, dim, every_steps; and
    versions."""


def run_status(uri: str, document: Mapping[str, Any], *, now: datetime | None = None) -> RunStatus:
    """Of the run at ``uri`` with the content of its config.json; ``now`` is for tests."""
    config = member(document, "config", dict[str, Any]) or {}
    checkpoints, commits = _checkpoints(uri)
    newest = commits[0] if commits else None
    finished = _finished(uri)
    files = record_files(uri)
    records = newest_records(files)
    step = newest.step if newest else 0
    seconds = _seconds_a_step(commits, records)
    schedule = _Schedule(
        num_steps=member(config, "train.num_steps", int),
        every_steps=member(config, "checkpoint.every_steps", int),
        seconds_a_step=seconds,
    )
    age_s = _age_s(newest, now or datetime.now(UTC))
    if finished is not None:
        step = max(step, finished["steps"])
    state = _state(checkpoints, schedule, step, age_s, is_finished=finished is not None)
    window = records[-WINDOW:]
    return RunStatus(
        kind="pretrain",
        uri=uri,
        state=state.name,
        detail=state.detail,
        step=step,
        num_steps=schedule.num_steps,
        last_commit=newest.created if newest else None,
        age_s=age_s,
        expected_interval_s=schedule.interval_s,
        eta_s=None if finished is not None else schedule.seconds_after(step),
        seconds_a_step=seconds,
        workers=newest.world_size if newest else None,
        window=len(window),
        rates=mean_rates(window),
        losses=loss_status(files, records),
        curve=loss_curve(files, records),
        validation=newest_validations(files, records),
        skipped_steps=int(records[-1].get("skipped_steps", 0)) if records else 0,
        anomalies=_anomalies(uri),
        worker_groups=len({commit.attempt for commit in commits}),
        checkpoints=checkpoints,
        data=_data(config, document, step),
        settings=_settings(config, document),
    )


class _Schedule(NamedTuple):
    """What a run has to do and how fast it is; None where that is not known."""

    num_steps: int | None
    every_steps: int | None
    """Steps from one checkpoint to the next."""
    seconds_a_step: float | None

    @property
    def interval_s(self) -> float | None:
        """Seconds from one checkpoint to the next."""
        if not self.every_steps or not self.seconds_a_step:
            return None
        return self.every_steps * self.seconds_a_step

    def seconds_after(self, step: int) -> float | None:
        """What the steps after ``step`` take."""
        if self.num_steps is None or self.seconds_a_step is None:
            return None
        return max(0, self.num_steps - step) * self.seconds_a_step

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint after ``step`` is part of the schedule, so that no stop was needed for it."""
        return not self.every_steps or step % self.every_steps == 0 or step == self.num_steps


class _State(NamedTuple):
    name: str
    """As in :class:`RunStatus`."""
    detail: str
    """What that is taken from."""


def _state(
    checkpoints: Sequence[CheckpointStatus],
    schedule: _Schedule,
    step: int,
    age_s: float | None,
    *,
    is_finished: bool,
) -> _State:
    """The state of a run that committed ``step`` ``age_s`` ago; None: no whole checkpoint is there."""
    if is_finished:
        return _State("finished", f"its summary ({FINISHED_NAME}) is there")
    if age_s is None:
        return _state_without_commit(checkpoints)
    interval_s = schedule.interval_s
    if interval_s is not None:
        limit_s = _OVERDUE_INTERVALS * interval_s + _OVERDUE_S
        if age_s <= interval_s:
            return _State("running", "the next checkpoint is not due yet")
        if age_s <= limit_s:
            return _State(
                "running",
                f"the next checkpoint is due, and overdue {duration_text(limit_s)} after the last one, as new workers take their time "
                "to start",
            )
    if not schedule.is_due(step):
        return _State(
            "stopped",
            f"step {step:,} was committed between two checkpoints, as a stop that is asked for does: the same command continues",
        )
    return _State(
        "stalled",
        "the next checkpoint is overdue: killed, hanging, or waiting for machines; the same command continues",
    )


def _state_without_commit(checkpoints: Sequence[CheckpointStatus]) -> _State:
    unusable = {one.state for one in checkpoints if one.state != "incomplete"}
    if unusable:
        what = "of a newer version" if unusable == {"newer"} else "damaged"
        return _State("damaged", f"all its checkpoints are {what}: its command cannot continue")
    return _State(
        "started", "nothing is committed yet: its command is at its first steps, or has ended"
    )


def _checkpoints(uri: str) -> tuple[tuple[CheckpointStatus, ...], list[Commit]]:
    """Every checkpoint folder, newest first, and the markers of whole ones."""
    found = examine_checkpoints(uri)
    checkpoints = tuple(
        CheckpointStatus(
            step=one.step,
            state=one.state,
            created=one.commit.created if one.commit else "",
            num_bytes=one.num_bytes,
            workers=one.commit.world_size if one.commit else 0,
            detail=one.detail,
        )
        for one in found
    )
    return checkpoints, [one.commit for one in found if one.commit and one.state == "whole"]


def _finished(uri: str) -> Mapping[str, Any] | None:
    try:
        return storage.read_object(storage.join(uri, FINISHED_NAME), {"steps": int})
    except storage.NotFoundError:
        return None


def _age_s(commit: Commit | None, now: datetime) -> float | None:
    if commit is None:
        return None
    # Clocks of two machines differ: a checkpoint is never from the future.
    return max(0.0, (now - datetime.fromisoformat(commit.created)).total_seconds())


def _seconds_a_step(commits: Sequence[Commit], records: Sequence[Record]) -> float | None:
    """What a step takes, validation and saving included, as far as two markers of one worker group tell."""
    if len(commits) >= 2 and commits[0].attempt and commits[0].attempt == commits[1].attempt:
        newer, older = commits[0], commits[1]
        passed = datetime.fromisoformat(newer.created) - datetime.fromisoformat(older.created)
        # Markers have whole seconds.
        if passed.total_seconds() >= 10 and newer.step > older.step:
            return passed.total_seconds() / (newer.step - older.step)
    times = [record["step_s"] for record in records[-WINDOW:] if "step_s" in record]
    return statistics.fmean(times) if times else None


def _anomalies(uri: str) -> int:
    try:
        return len(storage.list_files(storage.join(uri, ANOMALIES_DIR)))
    except storage.NotFoundError:
        return 0


def _data(config: Mapping[str, Any], document: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The data set; without numbers if it cannot be read from here, was replaced, or its manifest is very large."""
    uri = member(config, "data", str)
    fingerprint = member(document, "data_fingerprint", str)
    found: dict[str, Any] = {"uri": uri, "fingerprint": fingerprint}
    if not uri or HIDDEN in uri:
        # The configuration is stored without credentials.
        return found
    try:
        if storage.size(storage.join(uri, MANIFEST_NAME)) > _LARGEST_MANIFEST:
            return found
        manifest = load_manifest(uri)
    except (StorageError, DataError) as error:
        # Its text may hold what clients make of a URI.
        return found | {"problem": f"cannot be read from here ({type(error).__name__})"}
    if fingerprint and manifest.fingerprint != fingerprint:
        return found | {"problem": "replaced by another data set since the run began"}
    molecules = manifest.num_molecules("train")
    batch = member(config, "order.global_batch_size", int)
    return found | {
        "molecules": molecules,
        "quarantined": manifest.counts.rows_quarantined,
        "rows_in": manifest.counts.rows_in,
        "epochs": step * batch / molecules if batch and molecules else None,
    }


def _settings(config: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": member(config, "seed", int),
        "strategy": member(config, "train.strategy", str),
        "precision": member(config, "train.precision", str),
        "global_batch_size": member(config, "order.global_batch_size", int),
        "num_layers": member(config, "model.num_layers", int),
        "dim": member(config, "model.dim", int),
        "every_steps": member(config, "checkpoint.every_steps", int),
        "versions": member(document, "versions", dict[str, str]) or {},
    }
