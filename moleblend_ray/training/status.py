"""How a pretraining run is doing, from its files alone: nothing is asked of Ray, and little is read.

Files tell what was committed, when, and what is due. They do not tell whether a process lives: a run whose next
checkpoint is overdue was killed, or hangs, or waits for machines.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from moleblend_ray.data import storage
from moleblend_ray.data.dataset_files import MANIFEST_NAME
from moleblend_ray.data.manifest import load_manifest
from moleblend_ray.errors import HIDDEN, DataError, StorageError
from moleblend_ray.training.anomalies import ANOMALIES_DIR
from moleblend_ray.training.commits import (
    FINISHED_NAME,
    Commit,
    examine_checkpoints,
)
from moleblend_ray.training.metrics import (
    TOTAL_LOSS,
    VALID_PREFIX,
    Record,
    RecordFile,
    is_loss,
    record_files,
)

logger = logging.getLogger(__name__)

_TAIL_BYTES: Final = 256 << 10
_HEAD_BYTES: Final = 64 << 10
_LAST_LINE_BYTES: Final = 4 << 10
_WINDOW: Final = 100
"""Steps that means are over, and of the window before, with which they are compared."""
_CURVE_POINTS: Final = 24
_LARGEST_MANIFEST: Final = 32 << 20
_OVERDUE_INTERVALS: Final = 2.0
_OVERDUE_S: Final = 180.0
"""A checkpoint is overdue after so many intervals and so many seconds: a worker group that starts anew takes its time."""
_SIGNIFICANT: Final = 2.0
"""Standard errors by which two windows differ before a loss is said to move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossStatus:
    """One loss over the run."""

    name: str
    """``loss`` (what is optimised), or the head's."""
    first: float
    """Mean of the first steps on file."""
    last: float
    """Mean of the newest."""
    trend: str
    """``falling``, ``rising`` or ``level`` against the window before, ``unknown`` with too few steps."""


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
    config = document.get("config", {})
    checkpoints, commits = _checkpoints(uri)
    newest = commits[0] if commits else None
    finished = _finished(uri)
    files = record_files(uri)
    records = _tail(files)
    step = newest.step if newest else 0
    seconds = _seconds_a_step(commits, records)
    schedule = _Schedule(
        num_steps=_get(config, "train", "num_steps"),
        every_steps=_get(config, "checkpoint", "every_steps"),
        seconds_a_step=seconds,
    )
    age_s = _age_s(newest, now or datetime.now(UTC))
    if finished is not None:
        step = max(step, int(finished.get("steps", step)))
    state = _state(checkpoints, schedule, step, age_s, is_finished=finished is not None)
    window = records[-_WINDOW:]
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
        rates=_rates(window),
        losses=_losses(_head(files), records),
        curve=_curve(files, records),
        validation=_validation(records, files),
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
    if interval_s is not None and age_s <= _OVERDUE_INTERVALS * interval_s + _OVERDUE_S:
        return _State("running", "the next checkpoint is not overdue")
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
        return storage.read_object(storage.join(uri, FINISHED_NAME))
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
    times = [record["step_s"] for record in records[-_WINDOW:] if "step_s" in record]
    return statistics.fmean(times) if times else None


# ------------------------------------------------------------------------------------------------ records


def _tail(files: Sequence[RecordFile]) -> list[Record]:
    """The records of the newest two windows, in step order, each step once; the end of the newest files is read."""
    count = 2 * _WINDOW
    found: dict[int, Record] = {}
    for info in reversed(files):
        for record in _part(info, max(0, info.size - _TAIL_BYTES), _TAIL_BYTES):
            # The newer file of two that hold a step is read first; their numbers are the same.
            found.setdefault(int(record["step"]), record)
        if len(found) >= count:
            break
    return [found[step] for step in sorted(found)][-count:]


def _head(files: Sequence[RecordFile]) -> list[Record]:
    return _part(files[0], 0, _HEAD_BYTES)[:_WINDOW] if files else []


def _part(info: RecordFile, offset: int, length: int) -> list[Record]:
    """Records of the lines that lie wholly in this range of a file."""
    if not info.size:
        return []
    try:
        content = storage.read_range(info.uri, offset, min(length, info.size - offset))
    except StorageError as error:
        # A running command replaces files.
        logger.debug("left out: %s", error)
        return []
    lines = content.split(b"\n")
    if offset > 0:
        lines = lines[1:]
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by the range, or empty
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _curve(files: Sequence[RecordFile], newest: Sequence[Record]) -> tuple[float, ...]:
    """The loss at the ends of files over the whole run; of a run of one file, of its ``newest`` records."""
    if len(files) < 2:
        losses = [float(record[TOTAL_LOSS]) for record in newest if TOTAL_LOSS in record]
        stride = max(1, len(losses) // _CURVE_POINTS)
        return tuple(
            statistics.fmean(losses[i : i + stride]) for i in range(0, len(losses), stride)
        )
    stride = max(1, -(-len(files) // _CURVE_POINTS))
    chosen = [*files[:-1:stride], files[-1]]
    losses = []
    for info in chosen:
        records = _part(info, max(0, info.size - _LAST_LINE_BYTES), _LAST_LINE_BYTES)
        values = [float(record[TOTAL_LOSS]) for record in records if TOTAL_LOSS in record]
        losses += [statistics.fmean(values)] if values else []
    return tuple(losses)


def _rates(window: Sequence[Record]) -> dict[str, float]:
    """The figures of ``RunStatus.rates``, of those whose records have them."""
    if not window:
        return {}
    total_s = sum(record.get("step_s", 0.0) for record in window)
    found = {}
    for amount in ("molecules", "atoms"):
        # Of the whole window, not the mean of rates: slow steps weigh what they took.
        if all(amount in record and "step_s" in record for record in window):
            sum_of_amounts = sum(record[amount] for record in window)
            found[f"{amount}_per_s"] = sum_of_amounts / total_s if total_s else 0.0
    for name in ("mfu", "padding_share"):
        values = [record[name] for record in window if name in record]
        if values:
            found[name] = statistics.fmean(values)
    waits = [record["data_wait_s"] for record in window if "data_wait_s" in record]
    if waits and total_s:
        found["data_wait_share"] = sum(waits) / total_s
    newest = window[-1]
    for name in ("peak_memory_mib", "learning_rate", "grad_norm"):
        if name in newest:
            found[name] = newest[name]
    return {name: float(value) for name, value in found.items()}


def _losses(head: Sequence[Record], records: Sequence[Record]) -> tuple[LossStatus, ...]:
    half = min(_WINDOW, len(records) // 2)
    newest = records[-_WINDOW:]
    names = dict.fromkeys(name for record in newest for name in sorted(record) if is_loss(name))
    first = head[: max(1, min(_WINDOW, len(head) // 4))]
    return tuple(
        LossStatus(
            name=name,
            first=_mean(first, name),
            last=_mean(newest, name),
            trend=_trend(_values(records[-2 * half : -half], name), _values(records[-half:], name)),
        )
        for name in names
    )


def _trend(before: Sequence[float], after: Sequence[float]) -> str:
    if len(before) < 10 or len(after) < 10:
        return "unknown"
    difference = statistics.fmean(after) - statistics.fmean(before)
    error = math.sqrt(
        statistics.variance(before) / len(before) + statistics.variance(after) / len(after)
    )
    if abs(difference) <= _SIGNIFICANT * error:
        return "level"
    return "falling" if difference < 0 else "rising"


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records if math.isfinite(record.get(name, math.nan))]


def _mean(records: Sequence[Record], name: str) -> float:
    values = _values(records, name)
    return statistics.fmean(values) if values else math.nan


def _validation(
    records: Sequence[Record], files: Sequence[RecordFile]
) -> tuple[tuple[int, float], ...]:
    """The newest five: those in the records at hand, and in last lines of files, where validations often fall."""
    name = VALID_PREFIX + TOTAL_LOSS
    ends = [
        record
        for info in files[-5:]
        for record in _part(info, max(0, info.size - _LAST_LINE_BYTES), _LAST_LINE_BYTES)
    ]
    found = {
        int(record["step"]) + 1: float(record[name])
        for record in [*ends, *records]
        if name in record
    }
    return tuple((step, found[step]) for step in sorted(found)[-5:])


# ---------------------------------------------------------------------------------------------- the rest


def _anomalies(uri: str) -> int:
    try:
        return len(storage.list_files(storage.join(uri, ANOMALIES_DIR)))
    except storage.NotFoundError:
        return 0


def _data(config: Mapping[str, Any], document: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The data set; without numbers if it cannot be read from here, or its manifest is very large."""
    uri = config.get("data")
    found: dict[str, Any] = {"uri": uri, "fingerprint": document.get("data_fingerprint")}
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
    molecules = manifest.num_molecules("train")
    batch = _get(config, "order", "global_batch_size")
    return found | {
        "molecules": molecules,
        "quarantined": manifest.counts.rows_quarantined,
        "rows_in": manifest.counts.rows_in,
        "epochs": step * batch / molecules if batch and molecules else None,
    }


def _settings(config: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    model = config.get("model", {})
    return {
        "seed": config.get("seed"),
        "strategy": _get(config, "train", "strategy"),
        "precision": _get(config, "train", "precision"),
        "global_batch_size": _get(config, "order", "global_batch_size"),
        "num_layers": model.get("num_layers"),
        "dim": model.get("dim"),
        "every_steps": _get(config, "checkpoint", "every_steps"),
        "versions": document.get("versions", {}),
    }


def _get(config: Mapping[str, Any], section: str, name: str) -> Any:
    found = config.get(section)
    return found.get(name) if isinstance(found, Mapping) else None
