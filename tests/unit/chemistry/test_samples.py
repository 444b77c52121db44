from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rdkit import Chem

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.conformers import ConformerStatus
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_geometry, molecule_from_smiles
from moleblend_ray.chemistry.records import GeometryRow
from moleblend_ray.chemistry.samples import SampleMolecule, make_samples, write_samples
from moleblend_ray.errors import ConfigError


@pytest.fixture(scope="module")
def samples() -> list[SampleMolecule]:
    return list(make_samples(120, num_processes=1))


@pytest.fixture(scope="module")
def table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "deep" / "samples.parquet"
    assert write_samples(path, 60, num_processes=1) == 60
    return path


def test_molecules_are_distinct_canonical_and_drug_like(samples: list[SampleMolecule]) -> None:
    assert len({sample.smiles for sample in samples}) == 120
    for sample in samples:
        mol = Chem.MolFromSmiles(sample.smiles)
        assert 9 <= mol.GetNumAtoms() == len(sample.atomic_numbers) <= 26
        assert mol.GetRingInfo().NumRings() >= 1
        assert sample.logp <= 6.0
        assert np.isfinite(sample.positions).all()
    assert [sample.mol_id for sample in samples[:2]] == ["sample_000000", "sample_000001"]


def test_the_class_label_has_both_values_and_marks_sulfonamides(
    samples: list[SampleMolecule],
) -> None:
    pattern = Chem.MolFromSmarts("S(=O)(=O)N")
    share = np.mean([sample.sulfonamide for sample in samples])
    assert 0.05 < share < 0.6
    for sample in samples:
        assert sample.sulfonamide == Chem.MolFromSmiles(sample.smiles).HasSubstructMatch(pattern)


def test_processes_change_only_the_speed() -> None:
    alone = list(make_samples(100, seed=5, num_processes=1))
    together = list(make_samples(100, seed=5, num_processes=2))
    assert len(alone) == 100
    for first, second in zip(alone, together, strict=True):
        assert first.mol_id == second.mol_id
        assert first.smiles == second.smiles
        np.testing.assert_array_equal(first.positions, second.positions)


def test_a_script_is_not_run_again_by_the_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from moleblend_ray.chemistry.samples import make_samples\n"
        "print(len(list(make_samples(100, num_processes=2))))\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "100\n"


def test_a_smaller_collection_begins_a_larger_one_and_seeds_differ(
    samples: list[SampleMolecule],
) -> None:
    smaller = [sample.smiles for sample in make_samples(10, num_processes=1)]
    assert smaller == [sample.smiles for sample in samples[:10]]
    assert smaller != [sample.smiles for sample in make_samples(10, seed=1, num_processes=1)]


def test_rows_are_the_molecules_of_their_smiles(table_path: Path) -> None:
    config = FeaturizeConfig(canonical_order=True)
    num_same = 0
    for row in pq.read_table(table_path).to_pylist():
        fields = {name: row[name] for name in GeometryRow._fields}
        from_row = molecule_from_geometry(GeometryRow(**fields), config)
        from_smiles = molecule_from_smiles(row["smiles"], config)
        assert isinstance(from_row, Molecule)
        assert isinstance(from_smiles, Molecule)
        assert from_row.conformer_status is ConformerStatus.SOURCE
        columns = [0, 2, 3, 4, 5, 6, 7, 8]
        assert sorted(map(tuple, from_row.atom_features[:, columns].tolist())) == sorted(
            map(tuple, from_smiles.atom_features[:, columns].tolist())
        )
        # The geometry decides stereocentres that the SMILES leaves open; all other codes agree.
        num_same += from_row.smiles == from_smiles.smiles
    assert num_same > 20


def test_columns_are_those_of_a_geometry_table_with_three_labels(table_path: Path) -> None:
    schema = pq.read_schema(table_path)
    assert schema.names == [
        *("mol_id", "smiles", "n_atoms", "n_heavy", "atomic_numbers", "formal_charges"),
        *("positions", "bond_begin", "bond_end", "bond_order", "logp", "tpsa", "sulfonamide"),
    ]
    assert schema.field("positions").metadata == {b"unit": b"angstrom"}
    row = pq.read_table(table_path).slice(0, 1).to_pylist()[0]
    assert len(row["positions"]) == 3 * row["n_atoms"] == 3 * len(row["atomic_numbers"])
    assert set(row["bond_order"]) <= {1, 2, 3}


def test_a_finished_file_is_kept_and_any_other_is_replaced(
    table_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = table_path.read_bytes()
    changed = table_path.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert write_samples(table_path, 60, num_processes=1) == 60
    assert "already" in caplog.text
    assert table_path.stat().st_mtime_ns == changed
    table_path.write_bytes(before[: len(before) // 2])
    assert write_samples(table_path, 60, num_processes=1) == 60
    assert table_path.read_bytes() == before
    assert [path.name for path in table_path.parent.iterdir()] == [table_path.name]


def test_no_molecules_is_an_error() -> None:
    with pytest.raises(ConfigError, match="found 0"):
        next(make_samples(0))
