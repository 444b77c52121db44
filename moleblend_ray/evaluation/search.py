"""What a sweep varies, and how: ranges and choices of fine-tuning settings, searcher, scheduler. Imports nothing
heavy."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, TypeVar

from moleblend_ray.checks import Check, check_all
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.settings import typed

Scalar = bool | int | float | str | None
"""A value of a setting, as a searcher draws it and a file holds it."""

SEARCHERS: Final = ("optuna", "random")
SCHEDULERS: Final = ("asha", "median", "none")

_ALWAYS: Final = ("learning_rate", "weight_decay", "batch_size", "epochs")
"""Settings that have a range of their own below."""

_LOG_RATIO: Final = 100.0
"""A range from a to b >= 100 a spans orders of magnitude: it is drawn evenly in the logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    is_integer: bool = False
    """Whole numbers only."""
    is_log: bool = False
    """Drawn evenly in the logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of some values."""

    values: tuple[Scalar, ...]
    """Without order."""


Dimension = Range | Choice
"""What is drawn for one setting."""


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """What a sweep varies (defaults: the published ranges), and by which method."""

    learning_rate: tuple[float, float] | None = (1e-6, 1e-4)
    """Lowest and highest, drawn evenly in the logarithm; null: not varied."""
    weight_decay: tuple[float, float] | None = (1e-7, 1e-3)
    """Lowest and highest, drawn evenly in the logarithm; null: not varied."""
    batch_size: tuple[int, ...] | None = (32, 64, 128, 256)
    """Values to choose from; null: not varied."""
    epochs: tuple[int, int] | None = None
    """Fewest and most; null: the task's own range."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """More numbers of `finetune` to vary: name -> [lowest, highest]. Settings that are whole numbers get whole numbers.
    The draw is even in the logarithm if the highest is at least 100 times the lowest."""
    choices: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """More settings of `finetune` to vary: name -> values to choose from."""
    searcher: str = "optuna"
    """How configurations are drawn: optuna (TPE), random, or the class path of another searcher of Ray Tune."""
    searcher_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of Optuna's TPESampler (and `points_to_evaluate`), or of that class."""
    scheduler: str = "asha"
    """What stops worse trials early: asha, median, none, or the class path of another scheduler of Ray Tune."""
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its class in Ray Tune, such as `reduction_factor`."""

    def __post_init__(self) -> None:
        check_all(
            _log_range("learning_rate", self.learning_rate),
            _log_range("weight_decay", self.weight_decay),
            (
                self.batch_size is None or min(self.batch_size, default=0) >= 1,
                f"batch_size: expected values >= 1, found {list(self.batch_size or ())}",
            ),
            (
                self.epochs is None or 1 <= self.epochs[0] <= self.epochs[1],
                f"epochs: expected 1 <= fewest <= most, found {self.epochs}",
            ),
            _known("searcher", self.searcher, SEARCHERS),
            _known("scheduler", self.scheduler, SCHEDULERS),
            *((False, f"ranges: {problem}") for problem in self._range_problems()),
            *((False, f"choices: {problem}") for problem in self._choice_problems()),
        )

    def dimensions(self, task_epochs: tuple[int, int]) -> dict[str, Dimension]:
        """Setting -> what is drawn for it; ``task_epochs`` (fewest, most) is used if the space has no range of
        epochs."""
        fewest, most = self.epochs or task_epochs
        found: dict[str, Dimension] = {}
        for name, limits in (
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
        ):
            if limits is not None:
                found[name] = Range(low=limits[0], high=limits[1], is_log=True)
        if self.batch_size is not None:
            found["batch_size"] = Choice(values=self.batch_size)
        found["epochs"] = Range(low=fewest, high=most, is_integer=True)
        for name, (low, high) in self.ranges.items():
            is_integer = _number_type(name) is int
            found[name] = Range(
                low=int(low) if is_integer else low,
                high=int(high) if is_integer else high,
                is_integer=is_integer,
                is_log=low > 0 and low * _LOG_RATIO <= high,
            )
        for name, values in self.choices.items():
            found[name] = Choice(values=tuple(plain_value(name, value) for value in values))
        return found

    def tried(self, settings: FinetuneSettings) -> list[FinetuneSettings]:
        """What may become of ``settings``: each value of ``choices`` and each end of ``ranges`` is in one of these at least."""
        varied: dict[str, tuple[Scalar, ...]] = {**self.ranges, **self.choices}
        base = with_drawn(settings, {name: values[0] for name, values in varied.items()})
        return [
            base,
            *(with_drawn(base, {name: v}) for name, values in varied.items() for v in values),
        ]

    def without(self, names: Collection[str]) -> SearchSpace:
        """The same space, in which these settings of ``ranges`` and ``choices`` are not varied."""
        options = dict(self.searcher_options)
        if points := options.get("points_to_evaluate"):
            options["points_to_evaluate"] = [_left_of(point, names) for point in points]
        return dataclasses.replace(
            self,
            ranges=_left_of(self.ranges, names),
            choices=_left_of(self.choices, names),
            searcher_options=options,
        )

    def _range_problems(self) -> list[str]:
        problems = []
        for name, (low, high) in self.ranges.items():
            problem = _name_problem(name)
            if problem is None and _number_type(name) is None:
                problem = f"{name} is no number; list its values in choices"
            if problem is None and not low <= high:
                problem = f"{name}: expected lowest <= highest, found {[low, high]}"
            problem = problem or _value_problem(name, low) or _value_problem(name, high)
            problems += [problem] if problem else []
        return problems

    def _choice_problems(self) -> list[str]:
        problems = []
        for name, values in self.choices.items():
            problem = _name_problem(name)
            if problem is None and name in self.ranges:
                problem = f"{name} is in ranges too; expected it once"
            if problem is None and (not values or len(set(values)) < len(values)):
                problem = f"{name}: expected distinct values, found {list(values)}"
            if problem is None:
                problem = next(filter(None, (_value_problem(name, v) for v in values)), None)
            problems += [problem] if problem else []
        return problems


V = TypeVar("V")


def _left_of(values: Mapping[str, V], names: Collection[str]) -> dict[str, V]:
    return {name: value for name, value in values.items() if name not in names}


def with_drawn(settings: FinetuneSettings, drawn: Mapping[str, Any]) -> FinetuneSettings:
    """``settings`` with the values that a searcher drew. Raises ConfigError if they contradict each other."""
    return dataclasses.replace(settings, **plain_values(drawn))


def plain_values(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What a searcher drew, as plain values of the types of the settings: some searchers draw NumPy numbers."""
    return {name: plain_value(name, value) for name, value in drawn.items()}


def plain_value(name: str, value: Any) -> Scalar:
    """A value of the setting ``name`` as plain Python. Raises ConfigError if it is no value of this setting."""
    # Words and truth values of NumPy equal those that are listed, but have other types.
    known = next((listed for listed in _listed_values(name) if listed == value), value)
    drawn: dict[str, Any] = {name: known}
    plain: Scalar = getattr(FinetuneSettings(**drawn), name)
    return plain


def _value_problem(name: str, value: Any) -> str | None:
    """What is wrong with a value by itself."""
    try:
        plain_value(name, value)
    except ConfigError as error:
        # A value that contradicts the defaults may still fit other settings.
        return next((line for line in str(error).splitlines() if line.startswith(f"{name}:")), None)
    return None


def _name_problem(name: str) -> str | None:
    if name in _ALWAYS:
        return f"{name} has a setting of its own; expected search.{name}"
    if name not in _types():
        return f"{name} is no setting of finetune; expected one of {', '.join(_types())}"
    return None


@cache
def _types() -> Mapping[str, Any]:
    return typing.get_type_hints(FinetuneSettings)


def _options(name: str) -> tuple[Any, ...]:
    """The types that a setting may have; ``X | None`` has two."""
    annotation = _types()[name]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _number_type(name: str) -> type | None:
    """int or float if the setting is such a number (or null), else None."""
    return next((option for option in _options(name) if option in (int, float)), None)


def _listed_values(name: str) -> list[Scalar]:
    """All values of a setting with a fixed set of values; empty for numbers."""
    values: list[Scalar] = []
    for option in _options(name):
        if typing.get_origin(option) is typing.Literal:
            values += typing.get_args(option)
        elif option is bool:
            values += [False, True]
    return values


def _log_range(name: str, limits: tuple[float, float] | None) -> Check:
    return (
        limits is None or (0 < limits[0] <= limits[1] and math.isfinite(limits[1])),
        f"{name}: expected 0 < lowest <= highest, found {list(limits or ())}",
    )


def _known(name: str, value: str, names: tuple[str, ...]) -> Check:
    return (
        value in names or "." in value,
        f"{name}: expected {', '.join(names)} or the path of a class of Ray Tune "
        f"(ray.tune....), found {value!r}",
    )
