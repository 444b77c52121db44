"""Numbers that state where they come from, so that a plan never presents an assumption as a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Basis(StrEnum):
    """Where a figure comes from."""

    GIVEN = "given"
    """Set by the user."""
    MEASURED = "measured"
    """Found by a benchmark of this project on the hardware that the source names, or just now on this machine."""
    ASSUMED = "assumed"
    """Not measured by this project: from a data sheet or a publication, or a guess."""
    COMPUTED = "computed"
    """Computed by a formula; the assumptions behind it are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number with unit and origin."""

    value: float
    unit: str
    basis: Basis
    source: str
    """Benchmark, data sheet, formula or setting."""
    rests_on: tuple[str, ...] = ()
    """Names of the assumptions behind it; empty if it follows from measured and given figures alone."""


def given(value: float, unit: str, source: str) -> Figure:
    """A figure that the user set."""
    return Figure(value=value, unit=unit, basis=Basis.GIVEN, source=source)


def measured(value: float, unit: str, source: str) -> Figure:
    """A figure that a benchmark found."""
    return Figure(value=value, unit=unit, basis=Basis.MEASURED, source=source)


def assumed(value: float, unit: str, source: str, name: str) -> Figure:
    """A figure that was not measured; ``name`` is what figures that rest on it call the assumption."""
    return Figure(value=value, unit=unit, basis=Basis.ASSUMED, source=source, rests_on=(name,))


def computed(value: float, unit: str, source: str, *inputs: Figure) -> Figure:
    """A figure that follows from ``inputs`` and inherits their assumptions."""
    names = dict.fromkeys(name for figure in inputs for name in figure.rests_on)
    return Figure(
        value=value, unit=unit, basis=Basis.COMPUTED, source=source, rests_on=tuple(names)
    )
