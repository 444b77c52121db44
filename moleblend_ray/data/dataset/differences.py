"""Where two nested settings differ, and settings of before a key existed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every setting that differs, sorted by key.

    An absent key counts as None, and None beside a mapping as an empty one: the settings of a section that only one
    side has are named one by one. Tuples count, and are returned, as lists: that is what JSON makes of them.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, after = _with_lists(old.get(key)), _with_lists(new.get(key))
        if isinstance(before, Mapping | None) and isinstance(after, Mapping | None):
            inner = differences(before or {}, after or {})
            found |= {f"{key}.{name}": values for name, values in inner.items()}
        elif before != after:
            found[key] = (before, after)
    return dict(sorted(found.items()))


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the defaults of the settings that they lack, at every depth."""
    found = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(found[key], Mapping):
            found[key] = with_defaults(found[key], default)
    return found


def _with_lists(value: Any) -> Any:
    """A tuple as a list, with the tuples in it."""
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value
