"""Composition: groups, overrides, and values that need no quotes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from moleblend_ray.config.compose import compose, load_config
from moleblend_ray.config.downstream import FinetuneConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class _FewWorkers:
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    num_data_actors: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _WithoutCluster:
    cluster: _FewWorkers = field(default_factory=_FewWorkers)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/key/file.parquet",
        "data/with space/x.sdf",
        "runs/lr=0.1,b=2",
        "data/{a,b}*.sdf.gz",
        "a,b",
        "C:\\mols\\x.csv",
        "it's.csv",
        "data/*.csv",
    ],
)
def test_paths_need_no_quotes(value: str) -> None:
    assert compose("prepare", [f"source={value}"])["source"] == value


def test_a_source_may_be_several() -> None:
    several = ["source=[s3://b/a.parquet,data/b.sdf.gz]", "out=o"]
    config = load_config(PrepareConfig, "prepare", several)
    assert config.sources() == ("s3://b/a.parquet", "data/b.sdf.gz")
    assert load_config(PrepareConfig, "prepare", ["source=a.csv", "out=o"]).sources() == ("a.csv",)
    for nothing in ("source=[]", "source=[a.csv,'']", "source=''"):
        with pytest.raises(ConfigError, match="source: expected a path or URI"):
            load_config(PrepareConfig, "prepare", [nothing, "out=o"])


def test_values_keep_their_types() -> None:
    values = compose(
        "prepare", ["split_seed=3", "valid_fraction=1e-2", "id_column=null", "label_columns=[a,b]"]
    )
    assert values["split_seed"] == 3
    assert values["valid_fraction"] == 0.01
    assert values["id_column"] is None
    assert values["label_columns"] == ["a", "b"]


def test_a_value_on_the_command_line_wins_over_a_group() -> None:
    values = compose("prepare", ["cluster.num_data_actors=7", "cluster=gpu"])
    assert values["cluster"]["num_data_actors"] == 7
    assert values["cluster"]["use_gpu"] is True


def test_a_leading_plus_changes_nothing() -> None:
    plain = compose("pretrain", ["experiment=paper", "order.seed=3"])
    assert compose("pretrain", ["+experiment=paper", "++order.seed=3"]) == plain
    assert plain["order"] == {"global_batch_size": 4096, "seed": 3}


def test_an_unknown_group_choice_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cluster=gpuu: expected one of .*did you mean gpu\?"):
        compose("prepare", ["cluster=gpuu"])


def test_a_group_of_another_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="prepare has no group 'task'"):
        compose("prepare", ["task=esol"])


def test_an_unknown_job_lists_the_jobs() -> None:
    with pytest.raises(ConfigError, match="unknown job 'prepar'"):
        compose("prepar")


def test_a_missing_section_names_its_choices_and_its_required_keys() -> None:
    with pytest.raises(
        ConfigError, match=r"task=NAME of bace, bbbp.*; or task\.name=\.\.\. task\.source="
    ):
        load_config(FinetuneConfig, "finetune", ["out=runs/x"])


@pytest.mark.parametrize("value", ["[a.csv", "{a: 1", "[a,'b]"])
def test_a_bracket_that_is_never_closed_is_told_in_plain_words(value: str) -> None:
    with pytest.raises(ConfigError, match="a bracket, brace or quote is missing") as caught:
        compose("prepare", [f"source={value}"])
    assert value in str(caught.value)
    assert "grammar" not in str(caught.value)


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        compose("prepare", ["source"])


@pytest.mark.parametrize(
    ("override", "place"),
    [("cluster.num_worker=3", "the command line"), ("cluster.num_workers=x", "the command line")],
)
def test_errors_name_the_command_line(override: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"from {place}"):
        load_config(PrepareConfig, "prepare", ["source=a", "out=b", override])


def test_errors_name_the_file_that_holds_the_value() -> None:
    with pytest.raises(
        ConfigError, match=r"cluster\.use_gpu: unknown key .*conf/cluster/gpu\.yaml"
    ):
        load_config(_WithoutCluster, "prepare", ["cluster=gpu"])


@pytest.mark.parametrize(
    ("written", "shown"),
    [("[10]", r"""task\.columns=\["10"\]"""), ("[IC50 (nM)]", r"""KEY=\["a \(b\)"\]""")],
)
def test_a_name_that_needs_quotes_is_answered_with_one_that_can_be_read(
    written: str, shown: str
) -> None:
    own = ["task.name=own", "task.source=a.csv", "task.kind=regression", "out=o"]
    with pytest.raises(ConfigError, match=shown):
        load_config(FinetuneConfig, "finetune", [*own, f"task.columns={written}"])
    name = written.strip("[]")
    config = load_config(FinetuneConfig, "finetune", [*own, f'task.columns=["{name}"]'])
    assert config.task.columns == (name,)
