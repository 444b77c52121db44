"""Columns that a source lacks, or has twice, are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_files import inspected

from moleblend_ray.errors import ConfigError, DataError


def test_names_in_another_encoding_are_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("smiles,IC50 µM\nCCO,1\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"has no 'IC50 µM'.*not in UTF-8, save the file as such"):
        inspected(path, label_columns=("IC50 µM",))


def test_the_wrong_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("SMILES,logP,id\nC,1,a\n")
    with pytest.raises(
        ConfigError,
        match=r"smiles_column: .*t\.csv has no 'smiles'; it has 'SMILES', 'logP'.*mean 'SMILES'",
    ):
        inspected(path)
    with pytest.raises(ConfigError, match=r"id_column: .*has no 'idx'.*mean 'id'"):
        inspected(path, smiles_column="SMILES", id_column="idx")
    with pytest.raises(ConfigError, match=r"label_columns: .*has no 'logp'.*mean 'logP'"):
        inspected(path, smiles_column="SMILES", label_columns=("logp",))


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,y,y\nC,1,2\n")
    with pytest.raises(DataError, match=r"\['y'\] more than once"):
        inspected(path)
