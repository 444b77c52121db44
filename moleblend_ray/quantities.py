"""Amounts as people read them: bytes, lengths of time, numbers."""

from __future__ import annotations

import math

_THOUSAND = 999.5
"""From here on, three significant digits are written as 1e+03."""


def bytes_text(count: float) -> str:
    """A number of bytes with a decimal unit: 1,500,000 is "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < _THOUSAND:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{_three_digits(count)} PB"


def duration_text(seconds: float | None, otherwise: str = "unknown") -> str:
    """A length of time in one or two units: 12,000 s is "3 h 20 min"; ``otherwise`` if it is None or infinite."""
    if seconds is None or not math.isfinite(seconds):
        return otherwise
    if seconds < _THOUSAND / 1000:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 10 * 60:
        return _two_units(round(seconds), 60, "min", "s")
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return _two_units(minutes, 60, "h", "min")
    return _two_units(round(minutes / 60), 24, "d", "h")


def _two_units(count: int, size: int, large: str, small: str) -> str:
    """``count`` small units as large ones, each of ``size`` small ones, and the rest in small ones unless it is 0."""
    whole, rest = divmod(count, size)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def number_text(value: float) -> str:
    """A number with three significant digits, or in whole thousands: 2,340,000 is "2.34 million"."""
    if not math.isfinite(value):
        return "no limit"
    if value >= _THOUSAND * 1e6:
        return f"{_three_digits(value / 1e9)} billion"
    return f"{value / 1e6:.3g} million" if value >= 999_999.5 else _three_digits(value)


def _three_digits(value: float) -> str:
    """Three significant digits, or all of a larger whole number."""
    return f"{value:,.0f}" if value >= _THOUSAND else f"{value:.3g}"
