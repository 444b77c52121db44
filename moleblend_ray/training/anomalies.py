"""Steps whose numbers went bad: what is written down of them, and which losses are out of line."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moleblend_ray.data.files import storage
from moleblend_ray.errors import TrainingError
from moleblend_ray.training.metrics import Record

ANOMALIES_DIR: Final = "anomalies"
_WINDOW: Final = 200
_FEWEST: Final = 50
"""Losses that must have been seen before one can be out of line."""
_QUIET_STEPS: Final = 20
"""After a report, before the next: a jump that lasts is one event."""
_SMALLEST_DEVIATION: Final = 0.005
"""Of the median."""
_MAD_TO_DEVIATION: Final = 1.4826
"""Median absolute deviation -> standard deviation of a normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anomaly:
    """A step to be looked at, over all ranks."""

    step: int
    reason: str
    """``non_finite`` or ``spike``."""
    detail: str
    """In words."""
    record: Record
    """The step's numbers; those that are not finite are left out."""
    micro_batches: tuple[Mapping[str, Any], ...]
    """``rank``, ``stream``, ``index`` and ``molecule_ids`` (positions in the training split) of the suspects."""


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite. Raised on all ranks together; trying again gives the same."""

    def __init__(self, anomaly: Anomaly, stop: bool = False) -> None:
        super().__init__(anomaly.detail)
        self.anomaly = anomaly
        self.stop = stop
        """Whether a rank had asked to stop after this step."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For the way from a worker to the driver."""
        return type(self), (self.anomaly, self.stop)


def finite(record: Record) -> Record:
    """The numbers that are."""
    return {name: value for name, value in record.items() if math.isfinite(value)}


def write_anomaly(run_uri: str, anomaly: Anomaly) -> str:
    """Write ``anomalies/step-NNNNNNNN-REASON.json`` of a run; its URI. The same step again gives the same file."""
    uri = storage.join(run_uri, ANOMALIES_DIR, f"step-{anomaly.step:08d}-{anomaly.reason}.json")
    storage.write_json(
        uri,
        {
            "step": anomaly.step,
            "reason": anomaly.reason,
            "detail": anomaly.detail,
            "record": anomaly.record,
            "micro_batches": [dict(micro) for micro in anomaly.micro_batches],
        },
    )
    return uri


class SpikeDetector:
    """Tells losses that lie far above the last ones, by median and median absolute deviation: neither follows a spike."""

    def __init__(self, deviations: float | None) -> None:
        """``deviations``: how many standard deviations above the median is out of line; None for never."""
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._quiet = 0

    def update(self, loss: float) -> str | None:
        """Take the loss of the next step; in words what is wrong with it, if anything is."""
        problem = None if self._quiet else self._problem(loss)
        self._quiet = _QUIET_STEPS if problem else max(0, self._quiet - 1)
        self._losses.append(loss)
        return problem

    def _problem(self, loss: float) -> str | None:
        if self._deviations is None or len(self._losses) < _FEWEST:
            return None
        median = statistics.median(self._losses)
        deviation = _MAD_TO_DEVIATION * statistics.median(
            abs(value - median) for value in self._losses
        )
        # Losses that hardly move at all are no reason to call the next one odd.
        deviation = max(deviation, _SMALLEST_DEVIATION * abs(median))
        if loss <= median + self._deviations * deviation:
            return None
        return (
            f"loss {loss:.4g} is more than {self._deviations:g} standard deviations ({deviation:.2g}) above the "
            f"median of the last {len(self._losses)} steps ({median:.4g})"
        )
