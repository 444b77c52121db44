"""What the records of a run tell of its losses and rates. Little of each file is read, as runs have millions of steps."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moleblend_ray.data.files import storage
from moleblend_ray.errors import StorageError
from moleblend_ray.training.metrics import (
    TOTAL_LOSS,
    VALID_PREFIX,
    Record,
    RecordFile,
    is_loss,
    is_record,
)

logger = logging.getLogger(__name__)

_TAIL_BYTES: Final = 256 << 10
_HEAD_BYTES: Final = 64 << 10
_LAST_LINE_BYTES: Final = 4 << 10
WINDOW: Final = 100
"""Steps that means are over, and of the window before, with which they are compared."""
_CURVE_POINTS: Final = 24
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


def newest_records(files: Sequence[RecordFile]) -> list[Record]:
    """The records of the newest two windows, in step order, each step once; the end of the newest files is read."""
    count = 2 * WINDOW
    found: dict[int, Record] = {}
    for info in reversed(files):
        for record in _last_lines(info, _TAIL_BYTES):
            # The newer file of two that hold a step is read first; their numbers are the same.
            found.setdefault(int(record["step"]), record)
        if len(found) >= count:
            break
    return [found[step] for step in sorted(found)][-count:]


def _last_lines(info: RecordFile, num_bytes: int) -> list[Record]:
    return _part(info, max(0, info.size - num_bytes), num_bytes)


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
        if is_record(record):
            records.append(record)
    return records


def loss_curve(files: Sequence[RecordFile], newest: Sequence[Record]) -> tuple[float, ...]:
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
        records = _last_lines(info, _LAST_LINE_BYTES)
        values = [float(record[TOTAL_LOSS]) for record in records if TOTAL_LOSS in record]
        losses += [statistics.fmean(values)] if values else []
    return tuple(losses)


def mean_rates(window: Sequence[Record]) -> dict[str, float]:
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


def loss_status(files: Sequence[RecordFile], records: Sequence[Record]) -> tuple[LossStatus, ...]:
    """Each loss that the newest ``records`` have, against the first ones of ``files``."""
    head = _part(files[0], 0, _HEAD_BYTES)[:WINDOW] if files else []
    half = min(WINDOW, len(records) // 2)
    newest = records[-WINDOW:]
    names = dict.fromkeys(name for record in newest for name in sorted(record) if is_loss(name))
    first = head[: max(1, min(WINDOW, len(head) // 4))]
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


def newest_validations(
    files: Sequence[RecordFile], records: Sequence[Record]
) -> tuple[tuple[int, float], ...]:
    """The newest five: those in the records at hand, and in last lines of files, where validations often fall."""
    name = VALID_PREFIX + TOTAL_LOSS
    ends = [record for info in files[-5:] for record in _last_lines(info, _LAST_LINE_BYTES)]
    found = {
        int(record["step"]) + 1: float(record[name])
        for record in [*ends, *records]
        if name in record
    }
    return tuple((step, found[step]) for step in sorted(found)[-5:])
