"""Settings: frozen dataclasses whose values have their types, from strict mappings and back.

Nested mappings become nested dataclasses. Every problem in the whole tree (unknown key, missing key, wrong
type, value out of range) is collected, and one :class:`ConfigError` names them all with their full key path.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from moleblend_ray.errors import ConfigError

T = TypeVar("T")

Choices = Callable[[str], Sequence[str]]
"""Key path of a section -> names that choose it as a whole."""

Origin = Callable[[str], str | None]
"""Key path -> where its value was written ("conf/pretrain.yaml", "the command line"), None if unknown."""

_INVALID = object()


def typed(cls: type[T]) -> type[T]:
    """The dataclass `cls`, whose constructor makes of every value what its annotation says, as `build` does, before its own
    checks; a ConfigError naming every value of which that cannot be made.

    So settings in Python are checked like those on the command line, and a word, a list or array, or a number of NumPy is
    stored as a member, a tuple or an int.
    """
    make = cls.__init__

    @functools.wraps(make)
    def init(self: T, **values: Any) -> None:
        builder = _Builder(lambda _: None, lambda _: ())
        annotations = field_types(cls)
        for name in values.keys() & annotations.keys():
            values[name] = builder.value(annotations[name], values[name], name)
        if builder.problems:
            raise ConfigError("\n".join(sorted(builder.problems)))
        make(self, **values)

    setattr(cls, "__init__", init)  # noqa: B010
    return cls


def build(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    origin: Origin | None = None,
    choices: Choices | None = None,
) -> T:
    """An instance of the dataclass `cls` from plain `values`; a ConfigError naming every problem otherwise.

    Messages say where a value comes from by `origin`, and which names a missing section has by `choices`.
    """
    builder = _Builder(origin or (lambda _: None), choices or (lambda _: ()))
    config = builder.dataclass(cls, values, "")
    if builder.problems:
        raise ConfigError(_join_problems(cls.__name__, builder.problems))
    return typing.cast("T", config)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain mapping (str, int, float, bool, None, list, dict) from which `build` makes `config` again."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def run_checks(*checks: Callable[[], None]) -> None:
    """Run every check; raise one ConfigError with the messages of all that did."""
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def field_types(cls: type) -> dict[str, Any]:
    """Resolved type of every field of the dataclass `cls` that its constructor takes, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def nested_dataclass(annotation: Any) -> type | None:
    """The dataclass that `annotation` is, or that it holds as `X | None`; None if there is none."""
    for option in _options(annotation):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def leaf_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key path below the dataclass `cls`, sections included: "model", "model.dim", ..."""
    for name, annotation in field_types(cls).items():
        path = f"{prefix}{name}"
        yield path
        inner = nested_dataclass(annotation)
        if inner is not None:
            yield from leaf_paths(inner, f"{path}.")


def type_name(annotation: Any) -> str:
    """`annotation` as a user reads it: "int", "one of a, b", "list of int", "float or null"."""
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {type_name(arguments[0])}"
        return "list [" + ", ".join(type_name(argument) for argument in arguments) + "]"
    if origin in (dict, Mapping):
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    return getattr(annotation, "__name__", str(annotation))


class _Builder:
    """One pass over a value tree; `problems` holds a line for each thing that is wrong in it."""

    def __init__(self, origin: Origin, choices: Choices) -> None:
        self.problems: list[str] = []
        self._origin = origin
        self._choices = choices

    def dataclass(self, cls: type, values: object, path: str) -> Any:
        if not isinstance(values, Mapping):
            return self._mismatch(path, f"a section ({cls.__name__})", values)
        before = len(self.problems)
        annotations = field_types(cls)
        for key in values:
            if key not in annotations:
                self._unknown_key(path, str(key), cls, values[key])
        arguments = {
            name: self._argument(annotation, values[name], _child(path, name))
            for name, annotation in annotations.items()
            if name in values
        }
        for field in dataclasses.fields(cls):
            if field.init and field.name not in values and _is_required(field):
                where = _child(path, field.name)
                expected = self._expected(annotations[field.name], where)
                self.problems.append(f"{where}: required, but not given; expected {expected}")
        if len(self.problems) > before:
            self._check_the_rest(cls, arguments, path)
            return _INVALID
        return self._construct(cls, arguments, path)

    def _expected(self, annotation: Any, path: str) -> str:
        """What to give for a setting that is missing; for a section, the choices it has and its own required keys."""
        section = nested_dataclass(annotation)
        if section is None:
            return type_name(annotation)
        keys = [f"{path}.{f.name}=..." for f in dataclasses.fields(section) if _is_required(f)]
        choices = self._choices(path)
        by_name = f"{path}=NAME of {', '.join(choices)}; " if choices else ""
        return (
            f"{by_name}{'or ' if choices else ''}{' '.join(keys) or f'settings {path}.KEY=VALUE'}"
        )

    def value(self, annotation: Any, value: object, path: str) -> Any:
        value = _as_plain(value)
        options = _options(annotation)
        inner = nested_dataclass(annotation)
        if inner is not None and isinstance(value, Mapping):
            return self.dataclass(inner, value, path)
        for option in options:
            converted = self._convert(option, value, path)
            if converted is not _INVALID:
                return converted
        return self._mismatch(path, type_name(annotation), value)

    def _argument(self, annotation: Any, value: object, path: str) -> Any:
        """`value` as `annotation`; _INVALID if anything in it is wrong."""
        before = len(self.problems)
        made = self.value(annotation, value, path)
        return made if len(self.problems) == before else _INVALID

    def _convert(self, annotation: Any, value: object, path: str) -> Any:
        """`value` as `annotation`, or _INVALID. Only containers report problems of their own items."""
        origin = typing.get_origin(annotation)
        if annotation is Any:
            return value
        if annotation is type(None):
            return None if value is None else _INVALID
        if origin is typing.Literal:
            matches = [
                a for a in typing.get_args(annotation) if a == value and type(a) is type(value)
            ]
            return matches[0] if matches else _INVALID
        if origin is tuple:
            return self._tuple(typing.get_args(annotation), value, path)
        if origin in (dict, Mapping):
            return self._dict(typing.get_args(annotation)[1], value, path)
        if isinstance(annotation, type):
            return _scalar(annotation, value)
        raise TypeError(f"{path}: the builder does not know the annotation {annotation!r}")

    def _tuple(self, arguments: tuple[Any, ...], value: object, path: str) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return _INVALID
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            item_types: Sequence[Any] = [arguments[0]] * len(value)
        elif len(arguments) == len(value):
            item_types = arguments
        else:
            return _INVALID
        return tuple(
            self.value(item_type, item, f"{path}[{index}]")
            for index, (item_type, item) in enumerate(zip(item_types, value, strict=True))
        )

    def _dict(self, item_type: Any, value: object, path: str) -> Any:
        if not isinstance(value, Mapping):
            return _INVALID
        return {
            str(key): self.value(item_type, value[key], _child(path, str(key))) for key in value
        }

    def _construct(self, cls: type, arguments: dict[str, Any], path: str) -> Any:
        try:
            return cls(**arguments)
        except ConfigError as error:
            self._take_over(error, path, arguments)
            return _INVALID

    def _check_the_rest(self, cls: type, arguments: dict[str, Any], path: str) -> None:
        """Problems that `cls` itself finds in the values that were built, so that all are told at once."""
        valid = {name: value for name, value in arguments.items() if value is not _INVALID}
        try:
            cls(**valid)
        except ConfigError as error:
            about_valid = [line for line in str(error).splitlines() if _first_word(line) in valid]
            self._take_over(ConfigError("\n".join(about_valid)), path, valid)
        except TypeError:
            # A required field is among the problems: `cls` cannot be asked.
            return

    def _take_over(self, error: ConfigError, path: str, names: Mapping[str, Any]) -> None:
        """A dataclass's own complaints, one a line, "field: ..." each, with the full path of the field."""
        for line in filter(None, str(error).splitlines()):
            if _first_word(line) in names:
                full = _child(path, line)
                self.problems.append(full + self._where(full.partition(":")[0]))
            else:
                self.problems.append(f"{path}: {line}" if path else line)

    def _mismatch(self, path: str, expected: str, value: object) -> Any:
        found = "null" if value is None else f"{value!r} ({type(value).__name__})"
        hint = _hint(expected, value, path)
        where = self._where(path)
        self.problems.append(
            f"{path or 'configuration'}: expected {expected}, found {found}{where}{hint}"
        )
        return _INVALID

    def _unknown_key(self, path: str, key: str, cls: type, value: object) -> None:
        full = _child(path, key)
        nearest = _nearest_key(key, cls, path)
        suggestion = f"did you mean {nearest}?" if nearest else f"valid keys: {_keys_of(cls, path)}"
        self.problems.append(
            f"{full}: unknown key (value {value!r}){self._where(full)}; {suggestion}"
        )

    def _where(self, path: str) -> str:
        place = self._origin(path)
        return f", from {place}" if place else ""


def _first_word(line: str) -> str:
    return re.split(r"\W", line, maxsplit=1)[0]


def _nearest_key(key: str, cls: type, path: str) -> str | None:
    """Full path of the valid key most like `key`: among its siblings first, then anywhere below `cls`."""
    siblings = difflib.get_close_matches(key, list(field_types(cls)), n=1, cutoff=0.6)
    if siblings:
        return _child(path, siblings[0])
    # A key in the wrong section: any setting below with nearly this name.
    below: dict[str, str] = {}
    for candidate in leaf_paths(cls, _child(path, "")):
        below.setdefault(candidate.rsplit(".", 1)[-1], candidate)
    close = difflib.get_close_matches(key, list(below), n=1, cutoff=0.6)
    return below[close[0]] if close else None


def _keys_of(cls: type, path: str) -> str:
    return ", ".join(_child(path, name) for name in field_types(cls))


def _hint(expected: str, value: object, path: str) -> str:
    if isinstance(value, os.PathLike):
        return " (give it as text: str(path))"
    if expected.startswith("str") and isinstance(value, bool | int | float):
        text = f'"{json.dumps(value)}"'
        # Hydra takes no index: an item is given in its list.
        shown = f"{path.rpartition('[')[0]}=[{text}]" if path.endswith("]") else f"{path}={text}"
        return f" (quote it to make it text: '{shown}')"
    if expected.startswith("list") and isinstance(value, str):
        return f" (write a list: {path}=[a,b])"
    if expected.startswith("one of") and isinstance(value, str):
        words = expected.removeprefix("one of ").removesuffix(" or null").split(", ")
        close = difflib.get_close_matches(value, words, n=1)
        return f"; did you mean {close[0]}?" if close else ""
    return ""


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _scalar(annotation: type, value: object) -> Any:
    if dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else _INVALID
    if issubclass(annotation, enum.Enum):
        return next((member for member in annotation if value in (member, member.value)), _INVALID)
    if annotation in (int, float):
        return _number(annotation, value)
    if annotation is str and isinstance(value, str):
        return str(value)
    return value if type(value) is annotation else _INVALID


def _as_plain(value: Any) -> Any:
    """A number, truth value, text or array of NumPy, a column or index of a data frame, or a tensor, as those of Python."""
    tolist = None if isinstance(value, type) else getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _number(annotation: type, value: object) -> Any:
    """``value`` as an int or a float."""
    # bool is a subclass of int, but `num_layers: true` is a mistake.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return _INVALID
    if annotation is float:
        return float(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    # 1e4, which YAML and hydra read as a float.
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else _INVALID


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _join_problems(name: str, problems: Sequence[str]) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {name}:\n" + "\n".join(f"  {problem}" for problem in problems)
