"""Settings of fine-tuning and sweeps that no run could use are refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.describe import describe
from moleblend_ray.config.downstream import (
    BaselineConfig,
    EmbedConfig,
    FinetuneConfig,
    LeaderboardConfig,
    PredictConfig,
    SweepConfig,
    TaskConfig,
)
from moleblend_ray.config.paths import path_settings, with_absolute_paths
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.tasks import GROUPS, Metric, SplitKind, TaskKind

TASK = TaskConfig(name="esol", source="esol.csv")


def test_words_stand_for_the_members_of_enumerations() -> None:
    own: dict[str, Any] = {"name": "mine", "source": "a.csv", "columns": ("y",)}
    words: dict[str, Any] = {"kind": "regression", "metric": "mae", "split": "random"}
    found = TaskConfig(**own, **words)
    assert found == TaskConfig(
        **own, kind=TaskKind.REGRESSION, metric=Metric.MAE, split=SplitKind.RANDOM
    )
    # Code asks by identity: the word alone would be split in another way.
    assert found.resolve().split is SplitKind.RANDOM
    assert BaselineConfig(kinds=["forest"]).kinds == (BaselineKind.FOREST,)  # type: ignore[arg-type]
    for told, wrong in (
        (
            "kind: expected one of classification, regression or null, found 'classes'",
            {"kind": "classes"},
        ),
        ("metric: expected one of roc_auc, .*, found 'auc'", {"metric": "auc"}),
        ("columns: expected list of str, found 'pIC50'", {"columns": "pIC50"}),
    ):
        with pytest.raises(ConfigError, match=told):
            TaskConfig(**{**own, "kind": TaskKind.REGRESSION, **wrong})
    with pytest.raises(
        ConfigError, match=r"kinds\[0\]: expected one of forest, .*, found 'xgboost'"
    ):
        BaselineConfig(kinds=("xgboost",))  # type: ignore[arg-type]


@pytest.mark.parametrize("seeds", [(), (1, 1), (0, -1), (2**32,)])
def test_seeds_that_no_generator_takes_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^seeds: expected"):
        FinetuneConfig(task=TASK, out="out", seeds=seeds)
    with pytest.raises(ConfigError, match=r"^final_seeds: expected"):
        SweepConfig(task=TASK, out="out", final_seeds=seeds)


def test_a_search_seed_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^search_seed: expected 0 to"):
        SweepConfig(task=TASK, out="out", search_seed=-1)


@pytest.mark.parametrize("config", [FinetuneConfig, SweepConfig])
def test_every_setting_has_a_description_for_help(config: type) -> None:
    keys = list(describe(config))
    assert {"task.name", "cluster.use_gpu", "gpus_per_worker"} <= {key.path for key in keys}
    assert not [key.path for key in keys if not key.doc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ()}, r"models: expected a path or URI, found \(\)"),
        ({"models": ("a", "")}, "models: expected"),
        ({"models": "a", "conformers": -1}, "conformers: expected null or 0 to 255, found -1"),
        (
            {"models": "a", "applicability": 1.2},
            "applicability: expected null or 0 to 1, found 1.2",
        ),
        ({"models": "a", "source": ""}, "source: expected"),
        ({"models": "a", "source": ()}, r"source: expected a path or URI, found \(\)"),
        ({"models": "a", "source": ("b", "")}, "source: expected"),
    ],
)
def test_predictions_that_cannot_be_made_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PredictConfig(**{"source": "a.csv", "out": "out", **settings})


def test_models_are_paths_one_or_several() -> None:
    one = with_absolute_paths(PredictConfig(models="/runs/esol", source="/a.csv", out="/out"))
    assert one.model_uris() == ("/runs/esol",)
    several = PredictConfig(models=("/runs/esol/models/seed-0", "s3://b/m"), source="a", out="b")
    resolved = with_absolute_paths(several)
    assert resolved.model_uris() == several.model_uris()
    assert resolved.sources()[0].startswith("/")
    assert path_settings(several)["models[1]"] == "s3://b/m"


def test_molecules_are_paths_one_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["checkpoint=/m", "out=/out"]
    one = with_absolute_paths(load_config(EmbedConfig, "embed", [*given, "source=a.csv"]))
    assert one.sources() == (f"{tmp_path}/a.csv",)
    listed = load_config(EmbedConfig, "embed", [*given, "source=[b.csv,s3://x/*.sdf]"])
    several = with_absolute_paths(listed)
    assert several.sources() == several.source == (f"{tmp_path}/b.csv", "s3://x/*.sdf")
    assert path_settings(several)["source[1]"] == "s3://x/*.sdf"


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("moleculenet_regression", GROUPS["moleculenet_regression"]),
        (("qm9_gap", "bbbp"), ("qm9_gap", "bbbp")),
        (("bbbp",), ("bbbp",)),
    ],
)
def test_a_group_is_all_its_tasks_and_none_by_itself(
    name: str | tuple[str, ...], tasks: tuple[str, ...]
) -> None:
    config = TaskConfig(name=name, source="tables", split=SplitKind.RANDOM)
    assert config.is_group
    assert tuple(config.tasks()) == tasks
    assert {task.split for task in config.tasks().values()} == {SplitKind.RANDOM}
    with pytest.raises(ConfigError, match="is a group of tasks"):
        config.resolve()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ("bbbp", "esool")}, "did you mean 'esol'"),
        ({"name": "qm9", "columns": ("gap",)}, "columns: expected for one task only"),
        ({"columns": ("p_np", "p_np")}, "columns: expected each once"),
        (
            {"columns": ("p_np", "smiles")},
            "columns: expected columns of labels, found 'smiles', which",
        ),
        ({"name": "qm9", "unit": "eV"}, "unit: expected for one task only"),
        ({"name": "qm9", "split_file": "x.csv"}, "split_file: expected for one task only"),
        ({"name": "moleculenet", "metric": "mae"}, "mae does not fit classification"),
        ({"split_file": "x.csv", "split_column": "part"}, "split_file: expected either"),
        (
            {"split_column": "part", "split": "random"},
            "split: expected given, time or group with split_column",
        ),
        ({"split": "group"}, "split_column: expected a column of groups, such as projects, with"),
        ({"split": "group", "split_file": "x.csv"}, "split_column: expected a column of groups"),
        (
            {"name": "moleculenet", "split": "group", "split_column": "project"},
            "split: expected group for one task only, found with a group of tasks",
        ),
        ({"split": "time"}, "split_column: expected a column of dates or numbers with split=time"),
        (
            {"name": "moleculenet", "split": "time", "split_column": "year"},
            "split: expected time for one task only, found with a group",
        ),
        ({"split": "time", "split_file": "x.csv"}, "split_column: expected a column of dates or"),
        ({"censored": "true"}, "censored: expected for regression only"),
        ({"classes": "[a,b]", "name": "bbbp"}, "classes: expected with columns, which say where"),
        ({"classes": "[a]", "columns": "[y]"}, "classes: expected all of them, at least 2"),
        (
            {"classes": "[a,b]", "columns": "[y]", "name": "esol"},
            "classes: expected for classification only",
        ),
        ({"name": "moleculenet", "classes": "[a,b]"}, "classes: expected for one task only"),
        ({"name": "qm9", "censored": "true"}, "censored: expected for one task only"),
        ({"name": "esol", "relation_column": "rel"}, "relation_column: expected with censored=tr"),
        ({"folds": 2}, "folds: expected null or 3 to 1000, found 2"),
        ({"folds": 5, "split": "given"}, "folds: expected with a split by random, scaffold, sc"),
        ({"folds": 5, "split_column": "part"}, "folds: expected with a split by random, scaff"),
        (
            {"folds": 5, "split": "time", "split_column": "year"},
            "folds: expected with a split by random, scaffold, scaffold_balanced, butina or group",
        ),
        ({"fold": 0}, "fold: expected with folds, from 0 to folds - 1, found 0 with folds=None"),
        ({"folds": 5, "fold": 5}, "fold: expected with folds, from 0 to folds - 1, found 5 with"),
    ],
)
def test_tasks_that_contradict_themselves_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    given = {"name": "bbbp", "source": "x", **settings}
    overrides = [f"task.{key}={_spelled(value)}" for key, value in given.items()]
    with pytest.raises(ConfigError, match=message):
        load_config(SweepConfig, "sweep", [*overrides, "out=out"])


def _spelled(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def test_a_split_column_or_file_makes_the_split_given() -> None:
    ways: tuple[dict[str, Any], ...] = ({"split_column": "part"}, {"split_file": "split.csv"})
    for given in ways:
        assert TaskConfig(name="esol", source="x", **given).resolve().split is SplitKind.GIVEN
    by_group = TaskConfig(
        name="esol", source="x", split_column="project", split=SplitKind.GROUP, folds=5
    )
    assert by_group.resolve().split is SplitKind.GROUP
    by_time = TaskConfig(name="esol", source="x", split_column="year", split=SplitKind.TIME)
    assert by_time.resolve().split is SplitKind.TIME


def test_groups_lists_and_searches_are_told_on_the_command_line() -> None:
    config = load_config(
        SweepConfig,
        "sweep",
        [
            "task=moleculenet_small",
            "task.source=tables",
            "out=out",
            "search.ranges.layer_decay=[0.5,1]",
            "search.choices.readout=[token,mean]",
            "search.choices.frozen_blocks=[null,2]",
            "search.scheduler=ray.tune.schedulers.HyperBandScheduler",
            "search.scheduler_options.max_t=9",
            "search.weight_decay=null",
        ],
    )
    assert tuple(config.task.tasks()) == GROUPS["moleculenet_small"]
    assert config.search.ranges == {"layer_decay": (0.5, 1.0)}
    assert config.search.choices == {"readout": ("token", "mean"), "frozen_blocks": (None, 2)}
    assert config.search.scheduler_options == {"max_t": 9}
    assert config.search.weight_decay is None
    listed = load_config(
        SweepConfig, "sweep", ["task.name=[bbbp,qm9]", "task.source=tables", "out=out"]
    )
    assert tuple(listed.task.tasks()) == ("bbbp", *GROUPS["qm9"])


def test_a_comparison_needs_a_place_and_distinct_directories() -> None:
    for out in (None, "a", "b"):
        with pytest.raises(ConfigError, match="out: expected a directory of its own"):
            LeaderboardConfig(run="a", against=("b",), out=out)
    with pytest.raises(ConfigError, match="out: expected null or a path or URI, found an empty"):
        LeaderboardConfig(run="a", out="")
    with pytest.raises(ConfigError, match="against: expected distinct directories"):
        LeaderboardConfig(run="a", against=("a",), out="c")
    with pytest.raises(ConfigError, match="against: expected a path or URI, found"):
        LeaderboardConfig(run="a", against=("",), out="c")
    with pytest.raises(ConfigError, match=r"against\[0\]: expected str, .* \(give it as text"):
        LeaderboardConfig(run="a", against=(Path("b"),), out="c")  # type: ignore[arg-type]


def test_baselines_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kinds: expected each at most once, found \['forest'"):
        BaselineConfig(kinds=(BaselineKind.FOREST, BaselineKind.FOREST))
    with pytest.raises(
        ConfigError, match=r"num_trees: expected at least 1, found 0\nnum_rounds: .* -1"
    ):
        BaselineConfig(num_trees=0, num_rounds=-1)


def test_baselines_are_named_on_the_command_line() -> None:
    given = ["task=esol", "task.source=esol.csv", "out=out"]
    assert load_config(SweepConfig, "sweep", given).baseline.kinds == tuple(BaselineKind)
    some = load_config(SweepConfig, "sweep", [*given, "baseline.kinds=[scratch,forest]"])
    assert some.baseline.kinds == (BaselineKind.SCRATCH, BaselineKind.FOREST)
    assert load_config(SweepConfig, "sweep", [*given, "baseline.kinds=[]"]).baseline.kinds == ()
