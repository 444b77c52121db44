"""Each task of a group finds its molecules by name; what is missing or told twice is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError, StorageError
from moleblend_ray.evaluation.sources import TaskSources, source_of_task, task_sources
from moleblend_ray.evaluation.tasks import GROUPS, TASKS, TaskKind, resolve_task


def fill(folder: Path, *names: str) -> str:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("smiles\n")
    return str(folder)


def sources_of(source: str, *names: str) -> TaskSources:
    return task_sources(source, [TASKS[name] for name in names])


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("bbbp", "bbbp.csv.gz"),
        ("bbbp", "BBBP.csv"),
        ("esol", "delaney-processed.csv"),
        ("freesolv", "SAMPL.csv"),
        ("toxcast", "toxcast_data.csv.gz"),
        ("hiv", "hiv.parquet"),
        ("bace", "bace.sdf.gz"),
        ("qm7", "gdb7.tar.gz"),
        ("qm9_gap", "qm9.parquet"),
    ],
)
def test_a_table_is_found_by_the_task_s_name_or_its_published_one(
    task: str, file: str, tmp_path: Path
) -> None:
    source = fill(tmp_path, file, f"{task}.md", "other.csv")
    assert sources_of(source, task) == ({task: f"{source}/{file}"}, {})


def test_folders_of_downloads_and_prepared_datasets_are_found(tmp_path: Path) -> None:
    source = fill(
        tmp_path,
        "esol/delaney-processed.csv",
        "esol/download.json",
        "bbbp/manifest.json",
        "bbbp/train/0.parquet",
        # A table beside what was prepared of it.
        "bbbp.csv",
        "sider/notes.txt",
    )
    found, missing = sources_of(source, "bbbp", "esol", "sider")
    assert found == {"bbbp": f"{source}/bbbp", "esol": f"{source}/esol"}
    assert list(missing) == ["sider"]


def test_every_task_without_molecules_is_told_with_what_was_looked_for(tmp_path: Path) -> None:
    source = fill(tmp_path, "bbbp.csv")
    missing = sources_of(source, *GROUPS["moleculenet"]).missing
    assert set(missing) == set(GROUPS["moleculenet"]) - {"bbbp"}
    assert "delaney-processed.csv" in missing["esol"]


def test_a_choice_between_two_tables_is_refused_naming_both(tmp_path: Path) -> None:
    source = fill(tmp_path, "bbbp.csv", "bbbp.parquet")
    with pytest.raises(ConfigError, match=r"bbbp\.csv and bbbp\.parquet for task 'bbbp'"):
        sources_of(source, "bbbp")


@pytest.mark.parametrize("name", ["all.csv", "*.csv", "prepared"])
def test_a_file_a_glob_and_a_prepared_dataset_are_the_source_of_every_task(
    name: str, tmp_path: Path
) -> None:
    fill(tmp_path, "all.csv", "more.csv", "prepared/manifest.json")
    source = str(tmp_path / name)
    assert set(sources_of(source, *GROUPS["qm9"]).found.values()) == {source}


def test_a_folder_of_the_one_table_of_all_tasks_is_their_source(tmp_path: Path) -> None:
    source = fill(tmp_path, "dsgdb9nsd.xyz.tar.bz2", "uncharacterized.txt")
    assert sources_of(source, "qm9_gap", "qm9_mu").found == {"qm9_gap": source, "qm9_mu": source}
    assert list(sources_of(source, "qm9_gap", "bbbp").missing) == ["qm9_gap", "bbbp"]


def test_a_source_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        sources_of(str(tmp_path / "nowhere"), "bbbp")


def test_tables_in_an_object_store_are_found(s3_uri: str) -> None:
    for name in ("bbbp.csv", "esol/delaney-processed.csv", "esol/download.json"):
        storage.write_bytes(f"{s3_uri}/{name}", b"smiles\n")
    found = sources_of(s3_uri, "bbbp", "esol").found
    assert found == {"bbbp": f"{s3_uri}/bbbp.csv", "esol": f"{s3_uri}/esol"}


def test_a_single_task_takes_its_own_table_from_a_directory_of_several(tmp_path: Path) -> None:
    source = fill(tmp_path / "all", "delaney-processed.csv", "bbbp.csv.gz", "README.md")
    assert source_of_task(source, TASKS["esol"]) == f"{source}/delaney-processed.csv"
    # What names no table of its own is all of the directory, as in prepare.
    assert source_of_task(source, TASKS["hiv"]) == source
    own = resolve_task("bbbp_of_ours", columns=("y",), kind=TaskKind.CLASSIFICATION)
    assert source_of_task(fill(tmp_path / "all", "bbbp_of_ours.csv"), own) == source
    for other in (
        fill(tmp_path / "one", "esol.csv"),
        fill(tmp_path / "parts", "esol-0.csv", "esol-1.csv"),
        f"{source}/bbbp.csv.gz",
        f"{source}/*.csv",
        str(tmp_path / "missing"),
    ):
        assert source_of_task(other, TASKS["esol"]) == other
    with pytest.raises(ConfigError, match=r"esol\.csv .*for task 'esol'; expected one"):
        source_of_task(fill(tmp_path / "two", "esol.csv", "esol.parquet"), TASKS["esol"])
