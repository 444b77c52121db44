"""The settings of a job as text: every key with its type, default and docstring; secrets hidden."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moleblend_ray.errors import HIDDEN, without_credentials
from moleblend_ray.settings import field_types, nested_dataclass, to_dict, type_name

_SECRET_KEY = re.compile(r"secret|token|password|passwd|credential|api_?key|access_?key", re.I)


class KeyDoc(NamedTuple):
    """One setting."""

    path: str
    """Full key path: "order.seed"."""
    type: str
    """Type as a user reads it."""
    default: str
    """Default as YAML-like text, "required" if there is none."""
    doc: str
    """The field's docstring on one line."""


def describe(cls: type, prefix: str = "") -> Iterator[KeyDoc]:
    """Every setting below the dataclass `cls`, depth first, in the order of its fields."""
    docs = field_docs(cls)
    for name, annotation in field_types(cls).items():
        path = f"{prefix}{name}"
        inner = nested_dataclass(annotation)
        if inner is not None:
            yield from describe(inner, f"{path}.")
            continue
        default = _default_text(cls, name)
        yield KeyDoc(path, type_name(annotation), default, docs.get(name, ""))


def field_docs(cls: type) -> dict[str, str]:
    """The string literal after each field of `cls`, on one line; inherited fields included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            # A frozen application without sources still lists keys, types and defaults.
            continue
        definition = tree.body[0]
        if isinstance(definition, ast.ClassDef):
            docs.update(_docs_of(definition.body))
    return docs


def changed_settings(config: Any) -> dict[str, str]:
    """Key path -> value as text of every setting that differs from its default; secrets hidden."""
    values = flatten(redact(to_dict(config)))
    defaults = {key.path: key.default for key in describe(type(config))}
    return {path: text for path, text in values.items() if text != defaults.get(path)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Key path -> value as text, of a nested plain mapping."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = _text(value)
    return flat


def redact(value: Any, key: str = "") -> Any:
    """`value` (plain mappings, lists, scalars) with secrets and credentials in URIs replaced by ***."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.search(key):
        return HIDDEN if value else value
    return without_credentials(value)


def json_values(value: Any) -> Any:
    """`value` as JSON can hold it and people may read it: redacted, and null for numbers that are not finite."""
    return _finite(redact(value))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _docs_of(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            yield statement.target.id, " ".join(following.value.value.split())


def _default_text(cls: type, name: str) -> str:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default is not dataclasses.MISSING:
        return _text(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _text(field.default_factory())
    return "required"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _text(to_dict(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)
