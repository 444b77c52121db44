"""Searchers and schedulers of Ray Tune: which values a trial gets, and which trials are stopped early."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import optuna
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    PopulationBasedTrainingReplay,
    TrialScheduler,
)
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.search import Choice, Dimension, SearchSpace

METRIC: Final = "best_valid_score"
"""Metric that trials report and are compared by: their best validation score so far."""

REDUCTION_FACTOR: Final = 3
"""ASHA keeps one of this number of trials at each of its levels."""

_SEED_ARGUMENTS: Final = ("seed", "random_state", "random_state_seed")
"""Names that searchers have for their seed."""

_PACKAGES: Final = {
    "ax": "ax-platform",
    "bayesopt": "bayesian-optimization",
    "bohb": "hpbandster ConfigSpace",
    "hebo": "HEBO",
    "hyperopt": "hyperopt",
    "nevergrad": "nevergrad",
    "zoopt": "zoopt",
}
"""Module of ray.tune.search -> package that it needs."""


class RoomLimiter(ConcurrencyLimiter):
    """Draws a trial only while fewer are waiting or running than there is room for at that moment.

    Ray's own limit is that of the start, of this or an interrupted command, whatever nodes come and go.
    """

    room: ClassVar[Callable[[], int]]
    """Number of trials that may wait or run, at least 1. Of the class, as Tune unpickles the limiter of an interrupted command."""

    def __init__(self, searcher: Searcher) -> None:
        super().__init__(searcher, max_concurrent=1)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The settings of another trial; None if there is no room for it."""
        room = RoomLimiter.room()
        if room != self.max_concurrent:
            self.max_concurrent = room
            self._set_searcher_max_concurrency()  # type: ignore[no-untyped-call]
        return super().suggest(trial_id)


def build_searcher(
    search: SearchSpace, dimensions: Mapping[str, Dimension], mode: str, seed: int
) -> Searcher:
    """The searcher of the configuration, with its space; ``mode`` is ``max`` or ``min``.

    Raises ConfigError if its class or a package that it needs is missing, if it refuses its options, or if it cannot
    draw from this space (some searchers support numbers only).
    """
    options = dict(search.searcher_options)
    if search.searcher in ("optuna", "random"):
        return _optuna_searcher(search.searcher, options, dimensions, mode, seed)
    kind = _load_class(
        "searcher", search.searcher, Searcher, "For random draws: search.searcher=random"
    )
    known = inspect.signature(kind).parameters
    seeds = {name: seed for name in _SEED_ARGUMENTS if name in known}
    searcher: Searcher = _built("searcher", search.searcher, kind, {**seeds, **options})
    domains = {name: tune_domain(dimension) for name, dimension in dimensions.items()}
    try:
        has_taken = searcher.set_search_properties(METRIC, mode, domains)
    # Each searcher has its own error for parameters that it does not support.
    except (
        AssertionError,
        AttributeError,
        KeyError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"search.searcher: {search.searcher} cannot search {', '.join(domains)}: {_line(error)}. Take another "
            "searcher, or set what it cannot draw to null"
        ) from error
    if not has_taken:
        raise ConfigError(
            f"search.searcher: {search.searcher} has a space already; expected searcher_options without one"
        )
    return searcher


def build_scheduler(
    search: SearchSpace, mode: str, grace_epochs: int, longest: int
) -> TrialScheduler:
    """The scheduler of the configuration. No trial stops in its first ``grace_epochs`` or has more than ``longest``
    epochs.

    Raises ConfigError as :func:`build_searcher` does, and for population based training: it copies weights between
    trials through checkpoints, which these trials do not write.
    """
    options = dict(search.scheduler_options)
    grace = min(grace_epochs, longest)
    name = search.scheduler
    kind: Any
    defaults: dict[str, Any] = {}
    if name == "none":
        kind = FIFOScheduler
    elif name == "asha":
        kind = ASHAScheduler
        defaults = {"max_t": longest, "grace_period": grace, "reduction_factor": REDUCTION_FACTOR}
    elif name == "median":
        kind = MedianStoppingRule
        # Otherwise it would pause trials until there are enough to compare with, and they would start from the
        # beginning.
        defaults = {
            "time_attr": "training_iteration",
            "grace_period": grace,
            "min_time_slice": math.inf,
        }
    else:
        kind = _load_class("scheduler", name, TrialScheduler, "")
    if issubclass(kind, PopulationBasedTraining | PopulationBasedTrainingReplay):
        raise ConfigError(
            f"search.scheduler: {name} copies weights from trial to trial, and these trials keep none; expected one "
            "that stops trials, such as asha"
        )
    scheduler: TrialScheduler = _built("scheduler", name, kind, {**defaults, **options})
    scheduler.set_search_properties(METRIC, mode)
    return scheduler


def optuna_distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """A dimension as an Optuna distribution."""
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    if dimension.is_integer:
        low, high = int(dimension.low), int(dimension.high)
        return optuna.distributions.IntDistribution(low, high, log=dimension.is_log)
    return optuna.distributions.FloatDistribution(
        dimension.low, dimension.high, log=dimension.is_log
    )


def tune_domain(dimension: Dimension) -> Any:
    """A dimension as a Ray Tune domain, which its searchers convert to their own."""
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    if dimension.low == dimension.high:
        # Some searchers do not support a range with a single number.
        return tune.choice([dimension.low])
    if dimension.is_integer:
        # The second number is not included in its integer ranges.
        draw = tune.lograndint if dimension.is_log else tune.randint
        return draw(int(dimension.low), int(dimension.high) + 1)
    return (tune.loguniform if dimension.is_log else tune.uniform)(dimension.low, dimension.high)


def _optuna_searcher(
    name: str, options: dict[str, Any], dimensions: Mapping[str, Dimension], mode: str, seed: int
) -> OptunaSearch:
    """Optuna with its TPE sampler, or with random draws."""
    points = options.pop("points_to_evaluate", None)
    kind = optuna.samplers.RandomSampler if name == "random" else optuna.samplers.TPESampler
    return OptunaSearch(
        space={key: optuna_distribution(dimension) for key, dimension in dimensions.items()},
        metric=METRIC,
        mode=mode,
        points_to_evaluate=points,
        sampler=_built("searcher", name, kind, {"seed": seed, **options}),
    )


def _load_class(setting: str, path: str, base: type, advice: str) -> Any:
    """The class at the path ``package.module.Class``."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f"search.{setting}: {path} cannot be imported: {_line(error)}.{_install(path)}"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"search.{setting}: {module} has no {name}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"search.{setting}: {path} is no {base.__module__}.{base.__name__}. {advice}".rstrip()
        )
    return found


def _built(setting: str, path: str, kind: Any, options: Mapping[str, Any]) -> Any:
    """An instance of the class. Ray's own classes raise AssertionError if a package is not installed."""
    try:
        return kind(**options)
    except (AssertionError, ImportError) as error:
        raise ConfigError(
            f"search.{setting}: {path} cannot be made: {_line(error)}.{_install(path)}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"search.{setting}_options: {path} refuses {dict(options)}: {_line(error)}"
        ) from error


def _install(path: str) -> str:
    package = next((_PACKAGES[part] for part in path.split(".") if part in _PACKAGES), None)
    return f" Install it: pip install {package}" if package else ""


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
