"""Scores as text in reports and leaderboards, with as many decimal places as their size needs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def decimal_places(score: float) -> int:
    """4 for scores around 1, fewer for large ones, four significant digits for small ones."""
    exponent = math.floor(math.log10(abs(score))) if score else 0
    if exponent >= 1:
        return max(0, 4 - exponent)
    return 4 if exponent >= -1 else min(12, 3 - exponent)


def score_text(score: float) -> str:
    """The score alone."""
    return f"{score:.{decimal_places(score)}f}"


def mean_and_std_text(mean: float, std: float) -> str:
    """Mean ± standard deviation, both with the places of the mean."""
    places = decimal_places(mean)
    return f"{mean:.{places}f} ± {std:.{places}f}"


def values_text(mean: float, values: Sequence[float]) -> str:
    """The scores of all seeds with the places of their mean, separated by commas."""
    places = decimal_places(mean)
    return ", ".join(f"{value:.{places}f}" for value in values)
