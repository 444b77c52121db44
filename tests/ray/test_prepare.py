"""Preparing on Ray Data gives what the same chunks give in one process, once, and again after an interruption."""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from in_process import prepare_in_process

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.preparation.exchange import Unit
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.sources import (
    ColumnConfig,
)
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.orchestration.preparation.exchange import _run_tasks
from moleblend_ray.orchestration.preparation.prepare import prepare

pytestmark = pytest.mark.ray

ROWS_PER_CHUNK = 50


def config_for(source: Path, out: Path, **changes: Any) -> PrepareConfig:
    return PrepareConfig(
        source=str(source),
        out=str(out),
        rows_per_chunk=ROWS_PER_CHUNK,
        row_group_rows=16,
        cluster=ClusterConfig(num_data_actors=2),
        **changes,
    )


def in_process(source: Path, out: Path, num_chunks: int | None = None, **changes: Any) -> None:
    """The same job without Ray; with ``num_chunks`` left as a kill after as many chunks leaves it."""
    options = ConvertOptions(
        columns=ColumnConfig(), rows_per_chunk=ROWS_PER_CHUNK, row_group_rows=16, **changes
    )
    prepare_in_process(str(source), str(out), options, num_chunks=num_chunks)


def content_of(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def smiles(count: int) -> list[str]:
    """Distinct molecules, noisy enough in order that compressed files do not shrink to nothing."""
    found = [f"{'C' * a}{middle}{'C' * b}{end}" for a in range(1, 12) for b in range(1, 12)
             for middle in ("O", "N", "S", "C(=O)N", "C#C") for end in ("", "F", "Cl")]  # fmt: skip
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:count]]


def write_sources(directory: Path) -> None:
    """120 rows of CSV (one bad), 130 of Parquet and 3 records of SDF (one too large)."""
    directory.mkdir()
    lines = [f"{text},{row % 7}" for row, text in enumerate(smiles(119))]
    (directory / "a.csv").write_text("\n".join(["smiles,y", "C1CC,0", *lines]) + "\n")
    table = pa.table({"smiles": smiles(250)[120:], "z": np.arange(130) / 3})
    pq.write_table(table, directory / "b.parquet", row_group_size=20)
    record = "m\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n    0.0000    0.0000    1.0000 C   0  0\nM  END\n"
    image = f">  <image>\n{'x' * (17 << 20)}\n\n"
    (directory / "c.sdf").write_text(
        f"{record}$$$$\n{record}{image}$$$$\n{record}>  <y>\n7\n\n$$$$\n"
    )


def test_prepare_equals_the_job_in_one_process_and_a_rerun_does_nothing(
    ray_cluster: None, tmp_path: Path
) -> None:
    write_sources(tmp_path / "in")
    sources = tuple(str(path) for path in sorted((tmp_path / "in").iterdir()))
    config = dataclasses.replace(config_for(tmp_path, tmp_path / "out"), source=sources)
    summary = prepare(config)
    in_process(tmp_path / "in", tmp_path / "reference")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "reference")
    assert summary.status == "prepared"
    assert (summary.rows_in, summary.rows_out, summary.rows_quarantined) == (253, 251, 2)
    assert summary.train + summary.valid == 251
    assert summary.test == 0
    assert summary.quarantined_by_reason == {"invalid_record": 1, "unparsable_smiles": 1}
    manifest = load_manifest(str(tmp_path / "out"))
    assert [source.rows for source in manifest.sources] == [120, 130, 3]
    assert [(label.name, label.count) for label in manifest.labels] == [("y", 120), ("z", 130)]
    reader = ShardReader(str(tmp_path / "out"), manifest, "train", verify=True)
    assert reader.read(np.arange(reader.num_rows)).num_rows == summary.train

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = prepare(config)
    assert again.status == "already prepared"
    assert again.fingerprint == summary.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(ConfigError, match=r"valid_fraction: there 0\.05, now 0\.5"):
        prepare(config_for(tmp_path / "in", tmp_path / "out", valid_fraction=0.5))


def test_an_interrupted_and_a_damaged_source_are_continued_to_the_same_bytes(
    ray_cluster: None, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.csv.gz", tmp_path / "out"
    whole = gzip.compress("\n".join(["smiles", *smiles(400)]).encode(), mtime=0)
    source.write_bytes(whole)
    in_process(source, tmp_path / "reference")
    in_process(source, out, num_chunks=1)
    source.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r"in\.csv\.gz is damaged after record \d+"):
        prepare(config_for(source, out))
    receipts = [json.loads(path.read_text()) for path in out.glob("receipts/0*.json")]
    assert len(receipts) >= 4, "chunks before the damage are converted and kept"
    assert not (out / "manifest.json").exists()
    source.write_bytes(whole)
    summary = prepare(config_for(source, out))
    assert summary.status == "continued"
    assert summary.rows_in == 400
    assert content_of(out) == content_of(tmp_path / "reference")


def test_a_shuffle_by_several_actors_is_that_of_one_process(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(tmp_path / "in")
    settings: dict[str, Any] = {"shuffle": True, "deduplicate": "inchikey", "rows_per_shard": 60}
    in_process(tmp_path / "in", tmp_path / "whole", **settings)
    # The source is now of more groups than one: runs are written, and buckets read from them.
    monkeypatch.setattr("moleblend_ray.data.preparation.exchange._MAX_GROUP_BYTES", 1)
    summary = prepare(config_for(tmp_path / "in", tmp_path / "pieces", **settings))
    assert content_of(tmp_path / "pieces") == content_of(tmp_path / "whole")
    assert (summary.rows_in, summary.rows_out) == (253, 245)
    assert summary.quarantined_by_reason == {
        "duplicate": 6,
        "invalid_record": 1,
        "unparsable_smiles": 1,
    }
    assert 0 < summary.converting_seconds < summary.seconds


def test_the_split_file_of_a_source_decides_and_must_name_every_molecule(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in.csv").write_text("\n".join(["smiles", *smiles(60)]) + "\n")
    splits = {"train": [*range(40)], "valid": [*range(40, 50)], "test-dev": [*range(50, 59), 60]}
    (tmp_path / "split.json").write_text(json.dumps(splits))
    config = config_for(
        tmp_path / "in.csv", tmp_path / "out", split_file=str(tmp_path / "split.json")
    )
    with pytest.raises(DataError, match=r"split\.json names no split for row 59 of"):
        prepare(config)
    summary = prepare(
        dataclasses.replace(config, out=str(tmp_path / "2"), split_file_unnamed="quarantine")
    )
    assert (summary.train, summary.valid, summary.test) == (40, 10, 9)
    assert summary.quarantined_by_reason == {"not_in_split_file": 1}
    assert "names 1 rows after the last of the source, which has 60" in caplog.text
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in" / name).write_text("smiles\nC\n")
    with pytest.raises(ConfigError, match="names rows, which are those of one file"):
        prepare(dataclasses.replace(config, source=str(tmp_path / "in")))


def test_relative_paths_mean_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(tmp_path / "in")
    in_process(tmp_path / "in", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    summary = prepare(config_for(Path("in"), Path("out")))
    assert (summary.status, summary.out) == ("already prepared", str(tmp_path / "out"))


def test_bad_input_is_refused_before_any_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"lies inside source"):
        prepare(config_for(tmp_path / "in", tmp_path / "in" / "out"))
    with pytest.raises(ConfigError, match=r"a\.csv has no 'structure'; it has 'smiles', 'y'"):
        prepare(config_for(tmp_path / "in" / "a.csv", tmp_path / "out", smiles_column="structure"))
    several = dataclasses.replace(
        config_for(tmp_path / "in", tmp_path / "in" / "out"),
        source=("b.csv", str(tmp_path / "in" / "a.csv")),
        out=str(tmp_path / "in"),
    )
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "in" / "b.csv").write_text("smiles\nC\n")
    with pytest.raises(ConfigError, match=r"out: \S+ holds the source \S+b\.csv"):
        prepare(several)
    (tmp_path / "empty.sdf").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.sdf: empty"):
        prepare(config_for(tmp_path / "empty.sdf", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


REAL_FILES = {
    "geometry": {
        "zinc250k_smiles.csv.gz": (249_455, 0),
        "zinc_conformers29k.parquet": (29_064, 0),
        "qm9.parquet": (115_865, 0),
        "pcqm4mv2_2k.parquet": (1_792, 0),
        "cascade_dft8k.parquet": (7_454, 0),
    },
    "moleculenet": {
        "moleculenet/bbbp.csv.gz": (2_050, 11),
        "moleculenet/tox21.csv.gz": (7_831, 8),
        "moleculenet/sider.csv.gz": (1_427, 0),
        "moleculenet/clintox.csv.gz": (1_484, 4),
        "moleculenet/muv.csv.gz": (93_127, 0),
        "moleculenet/hiv.csv.gz": (41_127, 7),
        "moleculenet/esol.csv.gz": (1_128, 0),
        "moleculenet/lipophilicity.csv.gz": (4_200, 0),
    },
    # Apart, as its 617 labels would be columns of the others, too; the SD files have the ids of two tables above.
    "toxcast": {
        "moleculenet/toxcast.csv.gz": (8_615, 18),
        "qm9_1000.sdf.gz": (1_000, 0),
        "cascade_dft8k.sdf.gz": (7_454, 0),
    },
}
"""Files that are prepared together: rows and unparsable SMILES of each, from the README of the data."""


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("together", REAL_FILES)
def test_each_real_file_is_accounted_for(
    ray_cluster: None, shared_data: Path, tmp_path: Path, together: str
) -> None:
    files = {str(shared_data / name): counts for name, counts in REAL_FILES[together].items()}
    config = PrepareConfig(
        source=tuple(files),
        out=str(tmp_path / "out"),
        cluster=ClusterConfig(num_data_actors=2),
    )
    summary = prepare(config)
    rejected = [
        row
        for path in (tmp_path / "out").glob("quarantine/*.parquet")
        for row in pq.read_table(path, columns=["source_uri", "reason"]).to_pylist()
    ]
    unparsable = Counter(
        row["source_uri"] for row in rejected if row["reason"] == "unparsable_smiles"
    )
    sources = load_manifest(config.out).sources
    assert {source.uri: (source.rows, unparsable[source.uri]) for source in sources} == files
    assert summary.rows_in == summary.rows_out + summary.rows_quarantined
    assert len(rejected) == summary.rows_quarantined
    assert set(summary.quarantined_by_reason) <= {"unparsable_smiles", "too_many_atoms"}
    assert summary.train + summary.valid == summary.rows_out
    assert summary.duplicate_ids == 0


@pytest.mark.usefixtures("ray_cluster")
def test_units_of_an_exchange_end_with_it(tmp_path: Path) -> None:
    """On a cluster that lives on they would write into an output that may be another one by then."""
    begun, done = tmp_path / "begun", tmp_path / "done"

    def run(_: object, unit: str) -> DataError | None:
        if unit == "slow":
            begun.touch()
            time.sleep(3.0)
            done.touch()
            return None
        while not begun.exists():
            time.sleep(0.05)
        return DataError("the other one failed")

    task = ray.remote(num_cpus=0.5)(run)
    with pytest.raises(DataError, match="the other one failed"):
        list(_run_tasks(task, None, cast("list[Unit]", ["slow", "bad"]), 2, "out"))
    time.sleep(4.0)
    assert not done.exists()
