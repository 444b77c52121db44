"""Local paths in a configuration mean the folder the command was typed in, wherever its work runs."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Final, TypeVar

from moleblend_ray.errors import ConfigError

_ONE_SLASH: Final = re.compile(r"(s3a?|gs|gcs|https?|file):/(?!/)")

T = TypeVar("T")

PATH_FIELDS = frozenset(
    {
        "against",
        "checkpoint",
        "data",
        "dir",
        "models",
        "out",
        "results",
        "run",
        "source",
        "split_file",
        "spool",
    }
)
"""Names of the fields that hold a path or URI, or several."""


def with_absolute_paths(config: T) -> T:
    """`config` with every relative local path made absolute; URIs stay as they are.

    ConfigError for a URI that lacks a slash: it would be a path on this machine.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_absolute_paths(value)
        elif field.name in PATH_FIELDS and isinstance(value, str):
            changes[field.name] = _absolute(field.name, value)
        elif field.name in PATH_FIELDS and isinstance(value, tuple | list):
            changes[field.name] = tuple(_absolute(field.name, item) for item in value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def path_settings(config: object, prefix: str = "") -> dict[str, str]:
    """Key path -> path or URI of every such setting that is given."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found.update(path_settings(value, f"{prefix}{field.name}."))
        elif field.name in PATH_FIELDS and isinstance(value, str):
            found[f"{prefix}{field.name}"] = value
        elif field.name in PATH_FIELDS and isinstance(value, tuple | list):
            found.update(
                {f"{prefix}{field.name}[{index}]": item for index, item in enumerate(value)}
            )
    return found


def _absolute(name: str, path: str) -> str:
    if match := _ONE_SLASH.match(path):
        raise ConfigError(
            f"{name}: {path} has one slash after {match[1]}: and would be a path on this machine. Write "
            f"{match[1]}://{'/' if match[1] == 'file' else ''}{path[match.end() :]}"
        )
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
