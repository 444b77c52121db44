"""Text of reports and leaderboards: scores with as many digits as their size needs, and names that users chose."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from moleblend_ray.evaluation.tasks import Metric

_SMALLEST_EXPONENT: Final = -4
"""Scores below 10^-4 are written with a power of ten."""


def figure_text(text: str) -> str:
    """A name or unit for a figure. Matplotlib would read what stands between two dollars as a formula, and fail if it is none."""
    return text.replace("$", r"\$")


def table_cell(text: str) -> str:
    """A name or unit for a cell of a Markdown table, where a bar would end the cell, a line break (which spreadsheets have in
    headers) the row, and a tag would be none of the text."""
    line = " ".join(text.split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def score_text(score: float, like: float | None = None) -> str:
    """The score with 4 decimal places around 1, fewer for large ones, four significant digits for small ones; or with the
    digits of ``like``."""
    reference = score if like is None else like
    return _scaled(score, reference) + _power_of(reference)


def mean_and_std_text(mean: float, std: float, num_seeds: int) -> str:
    """Mean ± standard deviation, both with the digits of the mean; the mean alone of a single seed, whose spread is not
    known."""
    if num_seeds < 2:
        return score_text(mean)
    both = f"{_scaled(mean, mean)} ± {_scaled(std, mean)}"
    power = _power_of(mean)
    return f"({both}){power}" if power else both


def values_text(mean: float, values: Sequence[float]) -> str:
    """The scores of all seeds with the digits of their mean, separated by commas."""
    return ", ".join(score_text(value, mean) for value in values)


def _exponent(score: float) -> int:
    return math.floor(math.log10(abs(score))) if score else 0


def _scaled(value: float, reference: float) -> str:
    """``value``, without the power of ten that :func:`_power_of` gives for ``reference``."""
    exponent = _exponent(reference)
    if exponent < _SMALLEST_EXPONENT:
        return f"{value / 10.0**exponent:.3f}"
    if exponent >= 1:
        return f"{value:.{max(0, 4 - exponent)}f}"
    return f"{value:.{4 if exponent >= -1 else 3 - exponent}f}"


def _power_of(reference: float) -> str:
    exponent = _exponent(reference)
    return f"e{exponent:03d}" if exponent < _SMALLEST_EXPONENT else ""


def share_text(part: int, total: int) -> str:
    """Two counts, and the first in percent of the second; ``none`` if that is 0."""
    return f"{part:,} of {total:,} ({100 * part / total:.0f} %)" if total else "none"


def rank_key(score: float | None, higher_is_better: bool) -> float:
    """A number that is smaller for a better score, and infinite for none."""
    if score is None:
        return math.inf
    return -score if higher_is_better else score


def short(value: object) -> str:
    """A setting, for a cell of a table, as it is written in a configuration, numbers with three digits."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.3g}" if isinstance(value, float) else table_cell(str(value))


def metric_name(task: Mapping[str, Any]) -> str:
    """Name of the metric of a ``task`` of ``results.json``, of errors with the unit."""
    metric = Metric(task["metric"])
    unit = f" in {task['unit']}" if task["unit"] and metric.is_error else ""
    return f"{metric.shown_name}{unit}"
