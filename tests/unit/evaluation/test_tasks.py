"""Claims of the task table."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.tasks import (
    GROUPS,
    TASKS,
    Metric,
    SplitKind,
    TaskKind,
    is_group,
    resolve_task,
    task_names,
)

REPOSITORY = Path(__file__).resolve().parents[3]


def test_every_task_and_group_has_a_configuration_file_and_no_other_exists() -> None:
    files = {
        path.stem: path.read_text().strip() for path in (REPOSITORY / "conf/task").glob("*.yaml")
    }
    assert files == {name: f"name: {name}" for name in (*TASKS, *GROUPS)}


def test_groups_consist_of_tasks_and_share_no_name_with_one() -> None:
    assert not set(GROUPS) & set(TASKS)
    for members in GROUPS.values():
        assert set(members) <= set(TASKS)
        assert len(set(members)) == len(members)
    assert len(GROUPS["moleculenet"]) == 11
    assert set(GROUPS["moleculenet"]) - set(GROUPS["moleculenet_small"]) == {"hiv", "muv"}
    assert {TASKS[name].metric for name in GROUPS["qm9"]} == {Metric.MAE}


def test_a_name_a_group_and_a_list_stand_for_tasks_in_order_each_once() -> None:
    assert task_names("bbbp") == ("bbbp",)
    assert task_names("my_own_table") == ("my_own_table",)
    assert task_names("qm9") == GROUPS["qm9"]
    listed = ("esol", "moleculenet_regression", "bbbp", "esol")
    assert task_names(listed) == ("esol", "freesolv", "lipophilicity", "bbbp")
    assert [is_group(name) for name in ("bbbp", "my_own_table", "qm9", ("bbbp",))] == [
        False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(("names", "told"), [(("bbbp", "esool"), "'esool'.*'esol'"), ((), "none")])
def test_a_list_of_unknown_names_or_none_is_refused(names: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        task_names(names)


def test_qm8_has_four_quantities_by_four_methods_named_as_moleculenet_reads_them() -> None:
    columns = TASKS["qm8"].columns
    assert len(set(columns)) == 16
    assert columns[:4] == ("E1-CC2", "E2-CC2", "f1-CC2", "f2-CC2")
    assert {"E1-PBE0", "E1-PBE0.1", "f2-CAM"} <= set(columns)
    assert (TASKS["qm7"].columns, TASKS["qm7"].unit) == (("u0_atom",), "kcal/mol")


def test_published_tasks_are_scored_by_roc_auc_or_by_an_error() -> None:
    for task in TASKS.values():
        assert (task.metric is Metric.ROC_AUC) == (task.kind is TaskKind.CLASSIFICATION)
        assert task.metric is Metric.ROC_AUC or task.metric.is_error


def test_a_metric_of_other_labels_is_refused_with_those_that_fit() -> None:
    with pytest.raises(ConfigError, match="scored by one of rmse, mae, r2, spearman"):
        resolve_task("esol", metric=Metric.PR_AUC)
    with pytest.raises(
        ConfigError, match=r"scored by one of roc_auc, pr_auc, balanced_accuracy, mcc$"
    ):
        resolve_task("bbbp", metric=Metric.R2)
    assert resolve_task("muv", metric=Metric.PR_AUC).metric is Metric.PR_AUC


@pytest.mark.shared_data
def test_columns_of_the_table_are_those_of_the_published_files(shared_data: Path) -> None:
    named, unnamed = set(), set()
    for path in (shared_data / "moleculenet").glob("*.csv.gz"):
        name = path.name.removesuffix(".csv.gz")
        with gzip.open(path, "rt") as file:
            published = next(csv.reader(file))[1:]
        if TASKS[name].columns:
            assert set(TASKS[name].columns) == set(published)
            named.add(name)
        else:  # all columns of the file, whatever they are
            assert len(published) > 20
            unnamed.add(name)
    assert {"bbbp", "clintox", "esol", "lipophilicity", "tox21"} <= named
    assert unnamed == {"sider", "toxcast"}


def test_a_known_task_takes_the_users_metric_split_and_columns() -> None:
    task = resolve_task("esol", metric=Metric.MAE, split=SplitKind.RANDOM, columns=("logS",))
    assert (task.metric, task.split, task.columns) == (Metric.MAE, SplitKind.RANDOM, ("logS",))
    assert task.unit == TASKS["esol"].unit


def test_an_own_table_is_a_task_once_columns_and_kind_are_named() -> None:
    task = resolve_task("herg", columns=("blocker",), kind=TaskKind.CLASSIFICATION)
    assert (task.metric, task.split) == (Metric.ROC_AUC, SplitKind.SCAFFOLD)


def test_an_unknown_name_names_the_nearest_task_and_what_an_own_table_needs() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'esol'.*task\.columns.*task\.kind"):
        resolve_task("esool")


def test_a_metric_that_does_not_fit_the_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="rmse does not fit classification"):
        resolve_task("bbbp", metric=Metric.RMSE)


def test_the_kind_of_a_known_task_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match="esol' is regression"):
        resolve_task("esol", kind=TaskKind.CLASSIFICATION)
