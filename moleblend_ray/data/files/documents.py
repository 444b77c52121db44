"""Whether JSON documents have the types that their readers rely on: files are changed by hand, damaged, or of other programs.

Types are annotations: scalars, unions, ``dict[str, X]``, ``list[X]``, ``tuple[X, ...]``, dataclasses, ``Any``. A whole number
counts as a float, and a truth value as neither.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from moleblend_ray.settings import field_types, type_name

_field_types: Callable[[type], dict[str, Any]] = cache(field_types)


def require_types(record: Any) -> None:
    """TypeError naming the first field of the dataclass ``record``, at any depth, whose value is not what its annotation says.

    Constructors of dataclasses take everything, so what is made of a JSON document needs this check.
    """
    problem = _misfit(type(record), record, "")
    if problem:
        raise TypeError(problem)


def member(document: Any, path: str, annotation: Any) -> Any:
    """The value at ``path`` (``task.name`` is the member ``name`` of the member ``task``) of a JSON document; None if there is
    none, or one of another type."""
    found, value = _at(document, path)
    return value if found and not _misfit(annotation, value, path) else None


def lack(document: Any, members: Mapping[str, Any]) -> str:
    """What is wrong with a JSON document that must be an object with these ``members``, paths with annotations; "" if nothing
    is."""
    if not isinstance(document, dict):
        return "holds no JSON object"
    for path, annotation in members.items():
        found, value = _at(document, path)
        if not found:
            return f"has no {path!r}"
        if problem := _misfit(annotation, value, path):
            return f"is wrong: {problem}"
    return ""


def _at(document: Any, path: str) -> tuple[bool, Any]:
    """Whether there is a member at ``path``, and its value."""
    for name in path.split("."):
        if not isinstance(document, Mapping) or name not in document:
            return False, None
        document = document[name]
    return True, document


def _misfit(annotation: Any, value: Any, path: str) -> str:
    """``path: expected X, found Y`` for the first part of ``value`` that is not as annotated; "" if there is none."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return ""
    if origin in (typing.Union, types.UnionType):
        problems = [_misfit(option, value, path) for option in arguments]
        # A container of the right kind tells which of its items is wrong.
        inner = (problem for problem in problems if not problem.startswith(f"{path}: "))
        return "" if "" in problems else next(inner, _mismatch(annotation, value, path))
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, typing.cast(type, annotation)):
            return _mismatch(annotation, value, path)
        fields = _field_types(typing.cast(type, annotation)).items()
        return _first(
            _misfit(inner, getattr(value, name), f"{path}.{name}" if path else name)
            for name, inner in fields
        )
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _mismatch(annotation, value, path)
        return _first(_misfit(arguments[1], item, f"{path}.{key}") for key, item in value.items())
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return _mismatch(annotation, value, path)
        return _first(
            _misfit(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)
        )
    return "" if _is_scalar(annotation, value) else _mismatch(annotation, value, path)


def _first(problems: typing.Iterable[str]) -> str:
    return next(filter(None, problems), "")


def _is_scalar(annotation: Any, value: Any) -> bool:
    if annotation in (None, type(None)):
        return value is None
    if annotation in (int, float):
        kinds = int if annotation is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _mismatch(annotation: Any, value: Any, path: str) -> str:
    found = "null" if value is None else f"{value!r:.60} ({type(value).__name__})"
    return f"{path}: expected {type_name(annotation)}, found {found}"
