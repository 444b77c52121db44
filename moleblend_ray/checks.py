"""Conditions that settings must meet, and the sentences that name the setting, what was expected and what was found.

A condition is a pair (holds, message). :func:`check_all` tells all that fail at once. A field that may be null passes when it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from moleblend_ray.errors import ConfigError

Check = tuple[bool, str]


def check_all(*checks: Check) -> None:
    """Raise one ConfigError with the messages of all conditions that do not hold, one per line."""
    problems = [message for holds, message in checks if not holds]
    if problems:
        raise ConfigError("\n".join(problems))


def at_least(config: object, least: float, *names: str) -> Iterator[Check]:
    """The fields ``names`` of a dataclass are finite numbers of ``least`` or more."""
    return _each(config, names, lambda value: value >= least, f"at least {least:g}")


def above(config: object, bound: float, *names: str) -> Iterator[Check]:
    """The fields are finite numbers greater than ``bound``."""
    return _each(config, names, lambda value: value > bound, f"more than {bound:g}")


def within(config: object, least: float, most: float, *names: str) -> Iterator[Check]:
    """The fields are numbers from ``least`` to ``most``, both included."""
    return _each(config, names, lambda value: least <= value <= most, f"{least:g} to {most:g}")


def below_one(config: object, *names: str) -> Iterator[Check]:
    """The fields are shares or probabilities of 0 or more, but less than 1."""
    return _each(config, names, lambda value: 0 <= value < 1, "at least 0 and below 1")


def locations(config: object, *names: str) -> Iterator[Check]:
    """The fields are paths or URIs, none of them empty, and in a tuple of several at least one."""
    for name, value, null in _values(config, names):
        several = value if isinstance(value, tuple) else (value,)
        found = "an empty string" if value == "" else repr(value)
        yield (
            bool(several) and "" not in several,
            f"{name}: expected {null}a path or URI, found {found}",
        )


def _each(
    config: object, names: tuple[str, ...], holds: Callable[[Any], bool], expected: str
) -> Iterator[Check]:
    for name, value, null in _values(config, names):
        # JSON, in which a run stores its settings, has no infinity.
        finite = "a finite number of " if value == math.inf else ""
        yield (
            holds(value) and value != math.inf,
            f"{name}: expected {null}{finite}{expected}, found {value}",
        )


def _values(config: object, names: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    """Name and value of each field that is not null, and "null or " for those that may be."""
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in names:
        value = getattr(config, name)
        if value is not None:
            yield name, value, "null or " if "None" in types[name] else ""
