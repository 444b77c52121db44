"""Several tasks in one command: what each is given, and what is refused before any of them begins."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray

from moleblend_ray.chemistry.config import MAX_ATOMS
from moleblend_ray.config.downstream import FinetuneConfig, TaskConfig
from moleblend_ray.data.dataset.lease import InUseError, leased
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, DataError, TrainingError
from moleblend_ray.evaluation.sources import task_sources
from moleblend_ray.orchestration.downstream import task_groups
from moleblend_ray.orchestration.downstream.result_writing import has_results
from moleblend_ray.orchestration.downstream.task_groups import (
    _run_tasks,
    _task_configs,
    finetune_tasks,
)
from moleblend_ray.orchestration.identity import question
from moleblend_ray.settings import to_dict

RESULTS = {
    "task": {"name": "esol", "metric": "rmse", "higher_is_better": False, "unit": "log10(mol/L)"},
    "data": {"molecules": 60, "split": {"kind": "scaffold", "hash": "5f" * 8}},
    "final": {
        "name": "MoleBLEND, from scratch",
        "valid": {"mean": 1.0, "std": 0.0, "values": [1.0]},
        "test": {"mean": 1.5, "std": 0.0, "values": [1.5]},
    },
}


def config_for(folder: Path, *names: str) -> FinetuneConfig:
    return FinetuneConfig(
        task=TaskConfig(name=names, source=str(folder / "tables")), out=str(folder / "out")
    )


def fill(folder: Path, *names: str) -> None:
    (folder / "tables").mkdir(exist_ok=True)
    for name in names:
        (folder / "tables" / name).write_text("smiles,split\nC,train\nN,valid\nO,test\n")


def finish(config: FinetuneConfig) -> None:
    """What a finished fine-tuning of one task leaves, as far as it is looked at."""
    results = {**RESULTS, "config": to_dict(config)}
    storage.write_json(storage.join(config.out, "results.json"), results)
    storage.write_json(storage.join(config.out, "config.json"), {"config": question(config)})


def test_all_missing_files_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    fill(tmp_path, "esol.csv")
    config = config_for(tmp_path, "esol", "bbbp", "freesolv")
    with pytest.raises(ConfigError, match=r"bbbp \(bbbp\.csv\); freesolv .*skip_missing=true"):
        finetune_tasks(config)
    nothing = dataclasses.replace(
        config_for(tmp_path, "bbbp").task, skip_missing=True, source=str(tmp_path / "tables")
    )
    with pytest.raises(ConfigError, match="has no molecules for bbbp"):
        finetune_tasks(dataclasses.replace(config, task=nothing))
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_single_task_is_not_taken_for_several(tmp_path: Path) -> None:
    fill(tmp_path, "esol.csv")
    config = config_for(tmp_path, "esol")
    finish(config)
    with pytest.raises(ConfigError, match="results of a single task"):
        finetune_tasks(config)
    run_settings: dict[str, Any] = {"config": {"order": {}, "model": {}}}
    storage.write_json(storage.join(config.out, "config.json"), run_settings)
    with pytest.raises(ConfigError, match=r"`moleblend pretrain`.* for `moleblend finetune`"):
        finetune_tasks(config)


def test_other_settings_are_refused_before_a_leaderboard_of_errors_is_written(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "esol.csv", "bbbp.csv")
    config = config_for(tmp_path, "esol", "bbbp")
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    finish(_task_configs(config, sources)["bbbp"])
    with pytest.raises(ConfigError, match="split_seed: 0 there, 7 here"):
        finetune_tasks(dataclasses.replace(config, split_seed=7))
    assert not list((tmp_path / "out").glob("leaderboard*"))


def test_finished_tasks_need_no_cluster_and_make_the_leaderboard_again(tmp_path: Path) -> None:
    fill(tmp_path, "esol.csv")
    config = config_for(tmp_path, "esol", "freesolv")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, skip_missing=True))
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    finish(_task_configs(config, sources)["esol"])
    was_running = ray.is_initialized()
    sessions = []
    summary = _run_tasks(config, lambda _: sessions.append(ray.is_initialized()))
    assert sessions == [was_running]
    assert (summary.tasks, summary.tasks_finished, summary.tasks_absent) == (2, 1, 1)
    assert summary.already_finished
    text = (tmp_path / "out/leaderboard.md").read_text()
    assert "| 1.5000 |" in text
    assert "- freesolv: absent: " in text


def test_a_seed_is_added_to_tasks_that_are_finished_without_it(tmp_path: Path) -> None:
    fill(tmp_path, "esol.csv", "bbbp.csv")
    config = config_for(tmp_path, "esol", "bbbp")
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    more = dataclasses.replace(config, seeds=(0, 1))
    finish(_task_configs(config, sources)["esol"])
    finish(_task_configs(more, sources)["bbbp"])
    done = [has_results(one) for one in _task_configs(more, sources).values()]
    assert done == [False, True]
    task_groups._check_questions(more.out, _task_configs(more, sources))


def test_a_failing_addition_leaves_the_scores_that_are_there_in_the_leaderboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "esol.csv", "bbbp.csv")
    config = config_for(tmp_path, "esol", "bbbp")
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    finish(_task_configs(config, sources)["esol"])
    monkeypatch.setattr(task_groups, "ray_session", lambda cluster: contextlib.nullcontext())
    monkeypatch.setattr(task_groups, "check_cluster", lambda config: None)

    def run(config: FinetuneConfig) -> None:
        raise TrainingError(f"no room for {config.task.name}")

    with pytest.raises(
        TrainingError,
        match=r"2 of 2 tasks failed: esol: no room for esol; bbbp: no room for bbbp\. The same",
    ):
        _run_tasks(dataclasses.replace(config, seeds=(0, 1)), run)
    rows = storage.read_json(str(tmp_path / "out/leaderboard.json"))["tasks"]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("esol", "finished"),
        ("bbbp", "failed"),
    ]
    assert "| 1.5000 |" in (tmp_path / "out/leaderboard.md").read_text()


def test_nothing_is_prepared_again_for_tasks_that_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "qm9.csv")
    config = config_for(tmp_path, "qm9_gap", "qm9_mu")
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    for one in _task_configs(config, sources).values():
        finish(one)
    prepared: list[str] = []
    monkeypatch.setattr(
        task_groups, "prepare_molecules", lambda task, out, **options: prepared.append(out)
    )
    assert _run_tasks(config, lambda _: None).already_finished
    assert prepared == []
    # Where the molecules are still there, the command says if their source is another one now.
    storage.write_json(str(tmp_path / "out/data/qm9/manifest.json"), {})
    assert _run_tasks(config, lambda _: None).already_finished
    assert prepared == [str(tmp_path / "out/data/qm9")]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"smiles_column": "SMILES"}, ConfigError, r"^task\.smiles_column: .*has no 'SMILES'"),
        ({"split_column": "part"}, DataError, r"^task\.split_column: .*has no column 'part'"),
        ({"split_column": "smiles"}, ConfigError, r"^task\.split_column: .*says 'C' in row 0"),
    ],
)
def test_a_column_that_a_shared_source_lacks_or_that_says_no_splits_is_found_before_ray_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    fill(tmp_path, "qm9.csv")
    config = config_for(tmp_path, "qm9_gap", "qm9_mu")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, **changes))
    started: list[object] = []
    monkeypatch.setattr(task_groups, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(task_groups, "check_cluster", started.append)
    with pytest.raises(error, match=message):
        _run_tasks(config, started.append)
    assert started == []
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there_is_told_before_ray_is_started_and_leaves_nothing(
    tmp_path: Path, no_cluster: None
) -> None:
    """What it left made `out` one of several tasks, and refused a command for one of them."""
    fill(tmp_path, "esol.csv", "bbbp.csv")
    config = dataclasses.replace(config_for(tmp_path, "bbbp", "esol"), checkpoint="/absent/run")
    run: list[object] = []
    with pytest.raises(CheckpointError, match="/absent/run names no model"):
        _run_tasks(config, run.append)
    assert run == []
    assert not (tmp_path / "out").exists()


def test_settings_of_raw_molecules_are_refused_if_a_task_that_is_left_has_prepared_ones(
    tmp_path: Path, no_cluster: None
) -> None:
    fill(tmp_path, "esol.csv")
    prepared = tmp_path / "tables" / "bbbp"
    storage.write_json(str(prepared / "manifest.json"), {})
    config = config_for(tmp_path, "esol", "bbbp")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, max_atoms=50))
    with pytest.raises(ConfigError, match=rf"^task\.max_atoms: only for raw .* but {prepared} is"):
        _run_tasks(config, finish)
    assert not (tmp_path / "out").exists()
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    finish(_task_configs(config, sources)["bbbp"])
    assert _run_tasks(config, finish).tasks_finished == 2


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run for each task here needs none."""
    monkeypatch.setattr(task_groups, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(task_groups, "check_cluster", lambda _: None)


def test_several_tasks_that_another_command_works_on_are_left_alone(
    tmp_path: Path, no_cluster: None
) -> None:
    fill(tmp_path, "esol.csv", "bbbp.csv")
    config = config_for(tmp_path, "bbbp", "esol")
    with leased(config.out):
        with pytest.raises(InUseError, match=rf"^out: another command works on {config.out} at"):
            _run_tasks(config, finish)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["leases"]
    assert _run_tasks(config, finish).tasks_finished == 2
    assert not (tmp_path / "out" / "leases").exists()


@pytest.mark.parametrize(
    "error",
    [
        DataError("no labels."),
        TrainingError("no labels"),
        RuntimeError("no labels"),
        ValueError("no labels"),
    ],
)
def test_a_task_that_fails_is_recorded_the_next_one_is_done_and_the_end_names_it(
    tmp_path: Path, no_cluster: None, error: Exception
) -> None:
    fill(tmp_path, "esol.csv", "bbbp.csv")

    def run(config: FinetuneConfig) -> None:
        if config.task.name == "bbbp":
            raise error
        finish(config)

    with pytest.raises(TrainingError, match=r"1 of 2 tasks failed: bbbp: no labels\. The others"):
        _run_tasks(config_for(tmp_path, "bbbp", "esol"), run)
    rows = storage.read_json(str(tmp_path / "out/leaderboard.json"))["tasks"]
    assert [(row["name"], row["status"], row["reason"]) for row in rows] == [
        ("bbbp", "failed", str(error)),
        ("esol", "finished", ""),
    ]


def test_a_checkpoint_that_cannot_be_read_ends_the_command_at_once(
    tmp_path: Path, no_cluster: None
) -> None:
    fill(tmp_path, "esol.csv", "bbbp.csv")
    tried = []

    def run(config: FinetuneConfig) -> None:
        tried.append(config.task.name)
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        _run_tasks(config_for(tmp_path, "bbbp", "esol"), run)
    assert tried == ["bbbp"]


def test_tasks_have_folders_and_sources_of_their_own_or_share_one_prepared_for_all(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "esol.csv", "qm9.csv")
    config = config_for(tmp_path, "esol", "qm9_gap", "qm9_mu")
    task = dataclasses.replace(
        config.task, split_column="split", skip_missing=True, id_column="name", max_atoms=50
    )
    config = dataclasses.replace(config, task=task)
    found = _task_configs(config, task_sources(task.source, tuple(task.tasks().values())))
    assert {name: one.out for name, one in found.items()} == {
        name: str(tmp_path / "out" / name) for name in ("esol", "qm9_gap", "qm9_mu")
    }
    esol, gap, mu = (found[name].task for name in found)
    assert (esol.source, esol.split_column) == (str(tmp_path / "tables/esol.csv"), "split")
    assert gap.source == mu.source == str(tmp_path / "out/data/qm9")
    # Settings of raw molecules have done their work when the shared ones are prepared.
    assert (esol.id_column, esol.max_atoms) == ("name", 50)
    assert (gap.id_column, gap.max_atoms) == (None, MAX_ATOMS)
    assert (gap.split_column, gap.split_file) == (None, str(tmp_path / "out/data/qm9.split.json"))
    assert not any(one.is_group or one.skip_missing for one in (esol, gap, mu))
