"""Which settings may be added to finished fine-tunings and sweeps: a repeated command keeps what is there and adds the rest.

As :mod:`~moleblend_ray.evaluation.results.result_files`, it imports nothing that takes long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

ADDABLE: Final = ("seeds", "final_seeds", "baseline.kinds")
"""Settings of fine-tuning and sweeps to which a repeated command may add values: what is there stays."""


def is_addition(setting: str, there: Any, here: Any) -> bool:
    """Whether a command with the value ``here`` of a setting adds to results with the value ``there``, and changes none.

    The first seed chooses the settings of baselines, so seeds are added at the end; the order of baselines means nothing.
    """
    if setting not in ADDABLE or not (isinstance(there, Sequence) and isinstance(here, Sequence)):
        return False
    if setting == "baseline.kinds":
        return set(there) <= set(here)
    return list(here[: len(there)]) == list(there)


def missing_in(results: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Setting in :data:`ADDABLE` -> values that the settings ``asked`` have, and those of ``results`` do not."""
    found = {}
    for setting in ADDABLE:
        there, here = (_value(settings, setting) for settings in (results, asked))
        if missing := [value for value in here if value not in there]:
            found[setting] = missing
    return found


def with_those_of(results: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with the values of :data:`ADDABLE` that the settings of ``results`` have."""
    found = dict(settings)
    for setting in ADDABLE:
        section, _, name = setting.rpartition(".")
        there = results.get(section) if section else results
        if not isinstance(there, Mapping) or name not in there:
            continue
        if section:
            found[section] = {**(found.get(section) or {}), name: there[name]}
        else:
            found[name] = there[name]
    return found


def _value(settings: Mapping[str, Any], setting: str) -> Sequence[Any]:
    """The value of a setting of which a section is written before a dot; nothing if it is not there."""
    value: Any = settings
    for name in setting.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, list | tuple) else ()
