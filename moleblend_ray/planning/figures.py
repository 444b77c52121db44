"""Numbers that say where they come from, so that a plan never passes an assumption off as a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Basis(StrEnum):
    """Where a figure comes from."""

    GIVEN = "given"
    """The user said so."""
    MEASURED = "measured"
    """By a benchmark of this project, on the hardware that the source names, or just now on this machine."""
    ASSUMED = "assumed"
    """Nobody has measured it here: a data sheet, a published figure or a guess."""
    COMPUTED = "computed"
    """By a formula; what it rests on is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number with unit and origin."""

    value: float
    unit: str
    basis: Basis
    source: str
    """Benchmark, data sheet, formula or setting."""
    rests_on: tuple[str, ...] = ()
    """Names of the assumptions that decide it; empty if it follows from measured and given figures alone."""


def given(value: float, unit: str, source: str) -> Figure:
    """What the user set."""
    return Figure(value=value, unit=unit, basis=Basis.GIVEN, source=source)


def measured(value: float, unit: str, source: str) -> Figure:
    """What a benchmark found."""
    return Figure(value=value, unit=unit, basis=Basis.MEASURED, source=source)


def assumed(value: float, unit: str, source: str, name: str) -> Figure:
    """What nobody measured; ``name`` is how figures that rest on it call it."""
    return Figure(value=value, unit=unit, basis=Basis.ASSUMED, source=source, rests_on=(name,))


def computed(value: float, unit: str, source: str, *inputs: Figure) -> Figure:
    """What follows from ``inputs``, whose assumptions it inherits."""
    names = dict.fromkeys(name for figure in inputs for name in figure.rests_on)
    return Figure(
        value=value, unit=unit, basis=Basis.COMPUTED, source=source, rests_on=tuple(names)
    )
