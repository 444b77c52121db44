"""Searchers and schedulers by configuration draw from the space they are given, or say why they cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import SweepConfig, TaskConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.search import Choice, Dimension, Range, SearchSpace, plain_values
from moleblend_ray.evaluation.tasks import TASKS
from moleblend_ray.orchestration.downstream import sweep
from moleblend_ray.orchestration.downstream.searchers import (
    RoomLimiter,
    build_scheduler,
    build_searcher,
    optuna_distribution,
    tune_domain,
)
from moleblend_ray.orchestration.downstream.sweep import room_for_trials, search_method

optuna.logging.set_verbosity(optuna.logging.WARNING)

DIMENSIONS: dict[str, Dimension] = {
    "learning_rate": Range(low=1e-6, high=1e-4, is_log=True),
    "head_dropout": Range(low=0.0, high=0.3),
    "epochs": Range(low=2, high=4, is_integer=True),
    "micro_batch_size": Range(low=1, high=128, is_integer=True, is_log=True),
    "readout": Choice(values=("token", "mean")),
    "frozen_blocks": Choice(values=(None, 0)),
}

OPTUNA_BY_PATH = "ray.tune.search.optuna.OptunaSearch"


def draws(search: SearchSpace, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    searcher = build_searcher(search, DIMENSIONS, "max", seed)
    found = []
    for number in range(count):
        values = searcher.suggest(f"trial-{number}")
        assert values is not None
        found.append(plain_values(values))
    return found


@pytest.mark.parametrize("searcher", ["optuna", "random", OPTUNA_BY_PATH])
def test_every_searcher_draws_within_the_space_and_repeats_its_draws_for_a_seed(
    searcher: str,
) -> None:
    found = draws(SearchSpace(searcher=searcher))
    assert {tuple(values) for values in found} == {tuple(DIMENSIONS)}
    for name, dimension in DIMENSIONS.items():
        values = {trial[name] for trial in found}
        if isinstance(dimension, Choice):
            assert values == set(dimension.values)
        else:
            assert dimension.low <= min(values) < max(values) <= dimension.high
            assert dimension.is_integer == all(isinstance(value, int) for value in values)
    assert {trial["epochs"] for trial in found} == {2, 3, 4}
    # Evenly in the logarithm: half below the geometric mean.
    assert 10 < sum(trial["learning_rate"] < 1e-5 for trial in found) < 30
    assert draws(SearchSpace(searcher=searcher)) == found
    assert draws(SearchSpace(searcher=searcher), seed=1) != found


def test_dimensions_mean_the_same_to_optuna_and_to_tune() -> None:
    assert optuna_distribution(DIMENSIONS["learning_rate"]) == FloatDistribution(
        1e-6, 1e-4, log=True
    )
    assert optuna_distribution(DIMENSIONS["epochs"]) == IntDistribution(2, 4)
    assert optuna_distribution(DIMENSIONS["micro_batch_size"]) == IntDistribution(1, 128, log=True)
    assert optuna_distribution(DIMENSIONS["frozen_blocks"]) == CategoricalDistribution((None, 0))
    assert {tune_domain(DIMENSIONS["epochs"]).sample() for _ in range(60)} == {2, 3, 4}
    assert tune_domain(Range(low=3, high=3, is_integer=True)).categories == [3]
    assert {tune_domain(DIMENSIONS["readout"]).sample() for _ in range(60)} == {"token", "mean"}


def test_the_default_search_is_optuna_s_tpe_over_the_published_ranges() -> None:
    config = SweepConfig(task=TaskConfig(name="esol", source="esol.csv"), out="out", search_seed=3)
    searcher, scheduler = search_method(config, TASKS["esol"])
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3))
    expected = study.ask(
        {
            "learning_rate": FloatDistribution(1e-6, 1e-4, log=True),
            "weight_decay": FloatDistribution(1e-7, 1e-3, log=True),
            "batch_size": CategoricalDistribution((32, 64, 128, 256)),
            "epochs": IntDistribution(40, 100),
        }
    )
    assert searcher.suggest("trial") == expected.params
    assert isinstance(scheduler, ASHAScheduler)


def test_points_to_start_from_come_first() -> None:
    first = {
        "learning_rate": 5e-5, "head_dropout": 0.1, "epochs": 3,
        "micro_batch_size": 32, "readout": "mean", "frozen_blocks": None,
    }  # fmt: skip
    options = {"points_to_evaluate": [first], "n_startup_trials": 3}
    assert draws(SearchSpace(searcher_options=options), count=1) == [first]


@pytest.mark.parametrize(
    ("search", "told"),
    [
        ({"searcher": "ray.tune.search.hyperopt.HyperOptSearch"}, "pip install hyperopt"),
        ({"searcher": "ray.tune.search.zoopt.ZOOptSearch"}, "pip install zoopt"),
        ({"searcher": "no_such_package.Searcher"}, "no_such_package.Searcher cannot be imported"),
        ({"searcher": "ray.tune.search.NoSuchSearch"}, "ray.tune.search has no NoSuchSearch"),
        (
            {"searcher": "ray.tune.search.BasicVariantGenerator"},
            "is no .*Searcher.*searcher=random",
        ),
        ({"searcher_options": {"startup": 3}}, "searcher_options: optuna refuses"),
        ({"scheduler": "ray.tune.search.Searcher"}, "is no .*TrialScheduler"),
        ({"scheduler": "ray.tune.schedulers.PopulationBasedTraining"}, "trials keep none"),
        ({"scheduler_options": {"patience": 3}}, "scheduler_options: asha refuses"),
    ],
)
def test_what_cannot_search_is_refused_with_what_to_do(search: dict[str, Any], told: str) -> None:
    config = SweepConfig(
        task=TaskConfig(name="esol", source="esol.csv"), out="out", search=SearchSpace(**search)
    )
    with pytest.raises(ConfigError, match=told):
        search_method(config, TASKS["esol"])


class NumbersOnly(Searcher):
    """Refuses other dimensions, as some of Ray Tune's searchers do."""

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        if any(isinstance(domain, Categorical) for domain in config.values()):
            raise ValueError("parameters of type Categorical are not supported")
        return True


def test_a_searcher_that_knows_numbers_only_names_the_space_it_cannot_take() -> None:
    search = SearchSpace(searcher=f"{__name__}.NumbersOnly")
    numbers = {name: item for name, item in DIMENSIONS.items() if isinstance(item, Range)}
    assert isinstance(build_searcher(search, numbers, "min", 0), NumbersOnly)
    with pytest.raises(ConfigError, match=r"cannot search learning_rate.*Categorical"):
        build_searcher(search, DIMENSIONS, "min", 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("asha", ASHAScheduler),
        ("median", MedianStoppingRule),
        ("none", FIFOScheduler),
        ("ray.tune.schedulers.HyperBandScheduler", HyperBandScheduler),
    ],
)
def test_schedulers_are_made_for_the_trials_metric(name: str, kind: type[TrialScheduler]) -> None:
    scheduler = build_scheduler(SearchSpace(scheduler=name), "max", grace_epochs=5, longest=40)
    assert type(scheduler) is kind
    if kind is not FIFOScheduler:
        assert scheduler.metric == "best_valid_score"


def test_the_median_rule_counts_epochs_and_pauses_no_trial() -> None:
    rule = build_scheduler(SearchSpace(scheduler="median"), "max", grace_epochs=5, longest=40)
    trials = [Trial("any", stub=True) for _ in range(5)]
    others_wait: Any = SimpleNamespace(get_live_trials=lambda: trials)
    for number, trial in enumerate(trials):
        rule.on_trial_add(others_wait, trial)
        # Seconds pass at once; epochs decide. The last one is worse than the others.
        score = 0.9 if number < 4 else 0.1
        decisions = [
            rule.on_trial_result(
                others_wait,
                trial,
                {"training_iteration": epoch, "time_total_s": 1e6, "best_valid_score": score},
            )
            for epoch in range(1, 6)
        ]
        assert decisions == ["CONTINUE"] * 4 + ["STOP" if number == 4 else "CONTINUE"]


def test_asha_s_grace_is_never_longer_than_a_trial_and_options_count_more() -> None:
    short = build_scheduler(SearchSpace(), "min", grace_epochs=5, longest=2)
    assert isinstance(short, ASHAScheduler)
    assert (short._max_t, short._brackets[0]._rungs[-1][0]) == (2, 2)
    options = {"reduction_factor": 4, "grace_period": 1}
    own = build_scheduler(SearchSpace(scheduler_options=options), "min", grace_epochs=5, longest=64)
    assert isinstance(own, ASHAScheduler)
    assert [level for level, _ in own._brackets[0]._rungs] == [64, 16, 4, 1]


def test_as_many_trials_are_drawn_as_there_is_room_for_at_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = 1
    monkeypatch.setattr(RoomLimiter, "room", lambda: room, raising=False)
    limiter = RoomLimiter(build_searcher(SearchSpace(), DIMENSIONS, "max", 0))
    names = (f"trial-{number}" for number in range(100))

    def drawn() -> list[str]:
        found: list[str] = []
        while limiter.suggest(name := next(names)) is not None:
            found.append(name)
        return found

    (first,) = drawn()
    room = 3  # nodes have come
    assert len(drawn()) == 2
    room = 2  # one is gone
    limiter.on_trial_complete(first, {"best_valid_score": 0.5})
    assert drawn() == []


@pytest.mark.parametrize(
    ("cluster", "resources", "may_grow", "expected"),
    [
        ({}, {"CPU": 8.0}, False, 4),
        ({}, {"CPU": 8.0}, True, 5),
        ({}, {}, True, 1),  # no node yet
        ({}, {"CPU": 1.0}, False, 1),
        ({"cpus_per_worker": 0.2}, {"CPU": 1.0}, False, 5),
        ({"use_gpu": True}, {"CPU": 64.0, "GPU": 2.0}, False, 4),
        ({"use_gpu": True}, {"CPU": 4.0, "GPU": 2.0}, True, 3),
        # A private cluster has as many logical CPUs as it needs; these share the cores.
        ({"address": None}, {"CPU": 64.0}, False, 2),
    ],
)
def test_the_room_for_trials_is_that_of_the_nodes_and_one_more_where_others_can_come(
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, Any],
    resources: dict[str, float],
    may_grow: bool,
    expected: int,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sweep, "cluster_resources", lambda labels: resources)
    monkeypatch.setattr(sweep, "available_cpus", lambda: 4)
    settings = ClusterConfig(**{"address": "auto", "cpus_per_worker": 2.0, **cluster})
    config = SweepConfig(
        task=TaskConfig(name="esol", source="esol.csv"),
        out="out",
        cluster=settings,
        gpus_per_worker=0.5,
    )
    assert room_for_trials(config, may_grow=may_grow) == expected
