"""Every file under conf/ composes and validates, and every job can be asked what it would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from moleblend_ray import cli
from moleblend_ray.config.compose import (
    ModelPreset,
    config_dir,
    group_choices,
    job_groups,
    load_config,
    model_preset,
)
from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.settings import build, to_dict

# What a user has to say for each job.
REQUIRED = {
    "download": ("collection=qm9", "out=runs/raw"),
    "prepare": ("source=s3://b/x.sdf", "out=runs/data"),
    "data": ("data=runs/data",),
    "pretrain": ("data=runs/data", "out=runs/run"),
    "checkpoints": ("run=runs/run",),
    "finetune": ("task=esol", "task.source=s3://b/esol.csv", "out=runs/esol"),
    "sweep": ("task=bbbp", "task.source=s3://b/bbbp.csv", "out=runs/bbbp"),
    "refit": ("results=runs/esol", "out=runs/esol-final"),
    "leaderboard": ("run=runs/sweeps", "out=runs/board"),
    "embed": ("checkpoint=runs/run", "source=s3://b/x.csv", "out=runs/vectors"),
    "predict": ("models=[runs/esol,runs/other]", "source=s3://b/x.csv", "out=runs/predictions"),
    "plan": ("molecules=1e9", "gpus=64", "out=runs/plan"),
    "status": ("run=runs/run",),
    "export": ("checkpoint=runs/run", "out=runs/model"),
    "samples": ("out=runs/samples.parquet",),
}

GROUPS = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
CHOICES = [(group, choice) for group in GROUPS for choice in group_choices(group)]
# A file means the same in each job that has its group: the first such job is enough.
JOB_CHOICES = [
    (next(job for job in REQUIRED if group in job_groups(job)), group, choice)
    for group, choice in CHOICES
]


def load(job: str, *overrides: str) -> object:
    return load_config(cli.load_reference(cli.JOBS[job].config), job, [*REQUIRED[job], *overrides])


def test_every_file_belongs_to_a_job_or_to_a_group_of_one() -> None:
    jobs = {file.stem for file in config_dir().glob("*.yaml")}
    assert jobs == set(cli.JOBS) == set(REQUIRED)
    used = {group for job in jobs for group in job_groups(job)}
    assert set(GROUPS) == used


@pytest.mark.parametrize("job", list(REQUIRED))
def test_every_job_composes_and_validates(job: str) -> None:
    config = load(job)
    assert build(type(config), to_dict(config)) == config


def texts_of(value: object) -> Iterator[str]:
    """Every text in plain settings, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_of(item)


@pytest.mark.parametrize("job", list(REQUIRED))
def test_every_local_path_of_a_job_is_made_absolute(job: str) -> None:
    given = list(texts_of(to_dict(load(job))))
    found = list(texts_of(to_dict(with_absolute_paths(load(job)))))
    assert any(text.startswith("runs/") for text in given)
    assert not [text for text in found if text.startswith("runs/")]


@pytest.mark.parametrize(("job", "group", "choice"), JOB_CHOICES)
def test_every_choice_of_every_group_composes_and_validates(
    job: str, group: str, choice: str
) -> None:
    extra = ["order.num_streams=8"] if job == "pretrain" else []
    load(job, f"{group}={choice}", *extra)


@pytest.mark.parametrize("job", list(REQUIRED))
def test_dry_run_of_every_job_prints_its_configuration(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([job, *REQUIRED[job], "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{REQUIRED[job][-1].partition('=')[0]}: /" in shown
    assert "nothing was read or written" in shown


def test_defaults_live_in_the_dataclasses_only() -> None:
    assert model_preset("base") == ModelConfig()
    for file in sorted(config_dir().glob("*.yaml")):
        settings = [
            line
            for line in file.read_text().splitlines()
            if line and not line.startswith(("#", "defaults:", "  - "))
        ]
        assert settings == [], f"{file.name} repeats or changes defaults: {settings}"


def test_the_typed_names_of_model_presets_are_the_files() -> None:
    assert set(get_args(ModelPreset)) == set(group_choices("model"))


def test_every_job_but_the_small_ones_has_a_script() -> None:
    scripts = {file.stem for file in (config_dir().parent / "jobs").glob("*.py")}
    assert scripts >= {"download", "prepare", "pretrain", "finetune", "sweep", "embed", "predict"}


def test_the_paper_experiment_takes_the_official_decisions() -> None:
    config = load("pretrain", "experiment=paper")
    plain = to_dict(config)
    assert plain["blend"]["per_batch"] is True
    assert plain["model"]["edge_other_class"] is False
    assert plain["model"]["missing_positions"] == "origin"
    assert plain["loss"]["ignore_other_bonds"] is True
    assert plain["loss"]["denoise_lone_atoms"] is True
    assert plain["order"]["global_batch_size"] == 4 * 1024
    assert plain["optim"]["learning_rate"] == 1e-5
    assert plain["optim"]["warmup_steps"] == 20_000
    assert plain["train"]["num_steps"] == 200_000
    # The recipe's values that are also our defaults, so that a changed default does not change the paper's.
    assert plain["blend"]["pair_probabilities"] == [0.2, 0.2, 0.6]
    assert plain["blend"]["atom_probabilities"] == [0.4, 0.6]
    assert plain["blend"]["noise_std_angstrom"] == 0.2
    assert [
        plain["loss"][f"{name}_weight"] for name in ("spd", "edge", "direction", "denoise")
    ] == [0.1, 0.1, 0.5, 6.0]
    assert plain["loss"]["distance_weight"] == 0.0
    assert plain["optim"]["clip_norm"] == 5.0
    assert plain["optim"]["weight_decay"] == 0.0
    shape = [
        plain["model"][name]
        for name in ("num_layers", "dim", "ffn_dim", "num_heads", "num_kernels")
    ]
    assert shape == [12, 768, 768, 32, 128]


def test_a_paper_value_can_still_be_overridden() -> None:
    config = load("pretrain", "experiment=paper", "optim.learning_rate=2e-5", "model=base")
    assert to_dict(config)["optim"]["learning_rate"] == 2e-5


def test_conf_is_found_beside_the_package() -> None:
    assert config_dir() == Path(__file__).resolve().parents[2] / "conf"
