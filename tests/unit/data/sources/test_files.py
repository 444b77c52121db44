"""Which files are sources."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from source_files import geometry_table, records_of, smiles_of

from moleblend_ray.data.sources import (
    find_sources,
)
from moleblend_ray.errors import ConfigError, DataError, StorageError


def test_several_sources_are_read_in_the_order_given_and_no_file_twice(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "deep/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("smiles\nC\n")
    found = find_sources(str(tmp_path / "deep"), str(tmp_path / "*.csv"))
    assert [Path(file.uri).name for file in found] == ["c.csv", "a.csv", "b.csv"]
    with pytest.raises(ConfigError, match=r"a\.csv is in two of .*Leave one of them out"):
        find_sources(str(tmp_path / "a.csv"), str(tmp_path))


def test_no_molecule_files_and_unknown_kinds_are_told(tmp_path: Path) -> None:
    (tmp_path / "molecules.xyz").write_text("1\n")
    for uri in (tmp_path, tmp_path / "molecules.xyz"):
        with pytest.raises(DataError, match=r"found molecules\.xyz; expected \.sdf, \.csv"):
            find_sources(str(uri))
    with pytest.raises(StorageError, match=r"missing\.csv: it does not exist"):
        find_sources(str(tmp_path / "missing.csv"))
    with pytest.raises(
        StorageError, match=r"does not exist.* several sources, give a list: source="
    ):
        find_sources(f"{tmp_path}/molecules.xyz,{tmp_path}/missing.csv")
    (tmp_path / "Assay.XLSX").write_text("PK")
    with pytest.raises(DataError, match=r"found Assay\.XLSX; .* Save the sheet of a workbook as"):
        find_sources(str(tmp_path / "Assay.XLSX"))


def test_a_name_in_another_encoding_is_told_before_anything_is_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.csv")  # Latin-1
    (tmp_path / name).write_text("smiles\nC\n")
    with pytest.raises(DataError, match=r"caf\\udce9\.csv: its name is not in UTF-8\. Rename it"):
        find_sources(str(tmp_path))


def test_a_prepared_data_set_is_no_source(tmp_path: Path) -> None:
    ours = {"format_version": 1, "fingerprint": "x", "shards": []}
    (tmp_path / "manifest.json").write_text(json.dumps(ours))
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds a prepared data set already"):
        find_sources(str(tmp_path))


@pytest.mark.parametrize("content", ['{"format_version": 3, "files": []}', "[]", "not JSON"])
def test_a_manifest_of_another_program_is_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "x.csv").write_text("smiles\nC\n")
    assert [Path(file.uri).name for file in find_sources(str(tmp_path))] == ["x.csv"]


def test_a_source_in_s3_is_read_like_a_local_one(s3_uri: str, tmp_path: Path) -> None:
    from moleblend_ray.data.files import storage

    storage.write_bytes(s3_uri + "/a.csv.gz", gzip.compress(b"smiles,y\nC,1\nCC,2\n"))
    pq.write_table(geometry_table(), tmp_path / "g.parquet")
    storage.upload(tmp_path / "g.parquet", s3_uri + "/b.parquet")
    assert [record.mol_id for record in records_of(s3_uri)] == [None, None, "m0", "m1", "m2"]
    assert find_sources(s3_uri)[0].uri == s3_uri + "/a.csv.gz"


def test_text_files_in_a_directory_are_notes(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("C\n")
    (tmp_path / "m.smi").write_text("CC\n")
    assert smiles_of(records_of(tmp_path)) == ["CC"]
