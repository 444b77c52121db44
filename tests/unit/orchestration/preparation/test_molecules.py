"""Raw molecules of a downstream command are cut into chunks by what they are, not by where they are prepared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import EmbedConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.preparation.claim import claim_output, rows_per_chunk_of
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.sources import (
    ColumnConfig,
    SourceFile,
    SourceLayout,
    SourceSet,
    find_sources,
    inspect_sources,
)
from moleblend_ray.data.sources.records import Format
from moleblend_ray.orchestration.preparation import molecules
from moleblend_ray.orchestration.preparation.molecules import prepare_molecules, rows_per_chunk


def sources_of(form: Format, num_bytes: int, num_columns: int = 2, files: int = 1) -> SourceSet:
    layout = SourceLayout(
        file=SourceFile(uri=f"a.{form}", format=form, size=num_bytes // files, probe=""),
        columns=tuple(f"c{number}" for number in range(num_columns)),
        smiles_column="c0",
        id_column=None,
        labels=(),
        own_labels=(),
        has_geometry=False,
    )
    return SourceSet(layouts=(layout,) * files, labels=())


@pytest.mark.parametrize(
    ("sources", "rows"),
    [
        (sources_of("csv", 0), 64),
        (sources_of("csv", 100_000), 64),  # 2,000 molecules
        (sources_of("csv", 2_000_000), 1024),
        (sources_of("csv", 2_000_000, files=100), 1024),
        (sources_of("csv", 2_000_000, num_columns=300), 64),
        (sources_of("sdf", 5_000_000), 64),  # 2,000 molecules
        (sources_of("sdf", 500_000_000), 4096),
        (sources_of("csv", 10_000_000_000), 4096),
    ],
)
def test_a_small_library_has_many_chunks_and_a_large_one_large_chunks(
    sources: SourceSet, rows: int
) -> None:
    assert rows_per_chunk(sources) == rows


def prepared_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cluster: ClusterConfig | None = None
) -> PrepareConfig:
    """What is asked of `prepare` for the molecules in ``folder``."""
    asked: list[PrepareConfig] = []
    monkeypatch.setattr(molecules, "prepare", lambda config, **_: asked.append(config))
    config = EmbedConfig(
        checkpoint="/m",
        source=str(folder / "a.csv"),
        out=str(folder / "out"),
        cluster=cluster or ClusterConfig(),
    )
    prepare_molecules(
        config, config.out, label_columns=(), conformers=1, form=None, cluster=config.cluster
    )
    return asked[0]


def test_chunks_do_not_depend_on_the_cpus_and_stay_as_they_were_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("smiles\n" + "CCO\n" * 100)
    found = set()
    for cpus in (1, 3, 64):
        monkeypatch.setattr(molecules, "available_cpus", lambda cpus=cpus: cpus)
        found.add(prepared_rows(tmp_path, monkeypatch).rows_per_chunk)
    assert found == {64}
    # As an earlier version, or a source that was another before, has begun it.
    sources = inspect_sources(find_sources(str(tmp_path / "a.csv")), ColumnConfig(label_columns=()))
    options = ConvertOptions(columns=ColumnConfig(label_columns=()), rows_per_chunk=4096)
    claim_output(str(tmp_path / "out"), sources, options)
    assert prepared_rows(tmp_path, monkeypatch).rows_per_chunk == 4096


def test_the_rows_per_chunk_of_a_finished_data_set_are_in_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows_per_chunk_of(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text("{}")
    for options, rows in (({"rows_per_chunk": 4096}, 4096), ({}, 8192)):
        manifest = dataclasses.make_dataclass("Manifest", ["options"])(options)
        monkeypatch.setattr(
            "moleblend_ray.data.preparation.claim.load_manifest", lambda _, m=manifest: m
        )
        assert rows_per_chunk_of(str(tmp_path)) == rows


@pytest.mark.parametrize(
    ("cluster", "actors"),
    [
        (ClusterConfig(), 16),
        (ClusterConfig(local_cpus=5), 5),
        (ClusterConfig(num_data_actors=20), 20),
        (ClusterConfig(address="auto"), 2),
        (ClusterConfig(address="auto", num_data_actors=7), 7),
    ],
)
def test_a_cluster_of_the_commands_own_prepares_on_all_cpus_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: ClusterConfig, actors: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(molecules, "available_cpus", lambda: 16)
    monkeypatch.setattr("moleblend_ray.orchestration.cluster.session.available_cpus", lambda: 16)
    (tmp_path / "a.csv").write_text("smiles\nCCO\n")
    assert prepared_rows(tmp_path, monkeypatch, cluster).cluster.num_data_actors == actors
