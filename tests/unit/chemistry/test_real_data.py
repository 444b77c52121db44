"""Claims that need real molecules; skipped if these are not beside the project."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from many_rings import assert_identical
from rdkit import Chem

from moleblend_ray.chemistry import molecule as featurizer
from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.conformers import ConformerStatus
from moleblend_ray.chemistry.cost import smiles_may_be_slow
from moleblend_ray.chemistry.molecule import (
    Molecule,
    molecule_from_geometry,
    molecule_from_molblock,
    molecule_from_smiles,
    molecules_from_records,
)
from moleblend_ray.chemistry.records import GeometryRow, SmilesText
from moleblend_ray.chemistry.rejection import RejectionCode

pytestmark = pytest.mark.shared_data

CONFIG = FeaturizeConfig()
CANONICAL = FeaturizeConfig(canonical_order=True, max_atoms=4096)
COLUMNS = GeometryRow._fields


def geometry_rows(path: Path, limit: int | None = None) -> list[GeometryRow]:
    table = pq.read_table(path, columns=[*COLUMNS])
    return [GeometryRow(**row) for row in table.slice(0, limit).to_pylist()]


def sdf_records(path: Path, limit: int | None = None) -> Iterator[str]:
    with gzip.open(path, "rt") as file:
        lines: list[str] = []
        count = 0
        for line in file:
            if line.startswith("$$$$"):
                yield "".join(lines)
                lines = []
                count += 1
                if count == limit:
                    return
            else:
                lines.append(line)


def without_stereo(smiles: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def same_graph(first: Any, second: Any) -> bool:
    return (
        isinstance(first, Molecule)
        and isinstance(second, Molecule)
        and first.smiles == second.smiles
        and np.array_equal(first.atom_features, second.atom_features)
        and np.array_equal(first.bonds, second.bonds)
        and np.array_equal(first.bond_features, second.bond_features)
    )


def test_every_pcqm4mv2_row_featurizes_with_its_coordinates(shared_data: Path) -> None:
    rows = geometry_rows(shared_data / "pcqm4mv2_2k.parquet")
    molecules = [molecule_from_geometry(row, CONFIG) for row in rows]
    assert len(rows) == 1792
    assert all(isinstance(molecule, Molecule) for molecule in molecules)
    for row, molecule in zip(rows, molecules, strict=True):
        assert isinstance(molecule, Molecule)
        assert molecule.conformer_status is ConformerStatus.SOURCE
        assert molecule.position_mask.all()
        # Heavy atoms are in the source's order, with their own coordinates.
        heavy = np.asarray(row.atomic_numbers) > 1
        kept = molecule.atom_features[:, 0] > 0
        expected = np.asarray(row.positions, dtype=np.float32).reshape(-1, 3)[heavy]
        np.testing.assert_array_equal(molecule.positions[0, kept], expected)


def test_smiles_and_geometry_give_the_same_codes(shared_data: Path) -> None:
    """Except for 4 medium rings, whose double bond is E in the source's SMILES and Z in its geometry, or vice versa."""
    rows = geometry_rows(shared_data / "pcqm4mv2_2k.parquet")
    different = [
        row
        for row in rows
        if not same_graph(
            molecule_from_smiles(row.smiles, CANONICAL), molecule_from_geometry(row, CANONICAL)
        )
    ]
    assert len(different) == 4
    for row in different:
        molecule = molecule_from_geometry(row, CANONICAL)
        assert isinstance(molecule, Molecule)
        assert row.smiles is not None
        assert without_stereo(molecule.smiles) == without_stereo(row.smiles)


def test_heavy_atom_geometry_gives_the_graph_of_the_smiles_and_at_least_its_stereo(
    shared_data: Path,
) -> None:
    """ZINC conformers list no hydrogens: default valences imply them, also those of charged atoms.

    Geometry adds what the SMILES leaves open (protonated amines), it never contradicts.
    """
    rows = geometry_rows(shared_data / "zinc_conformers29k.parquet", limit=1500)
    num_same = 0
    for row in rows:
        from_smiles = molecule_from_smiles(row.smiles, CANONICAL)
        from_row = molecule_from_geometry(row, CANONICAL)
        assert isinstance(from_smiles, Molecule)
        assert isinstance(from_row, Molecule)
        num_same += same_graph(from_smiles, from_row)
        if not same_graph(from_smiles, from_row):
            assert from_row.smiles.count("@") > from_smiles.smiles.count("@")
            assert without_stereo(from_row.smiles) == without_stereo(from_smiles.smiles)
    assert num_same > 0.9 * len(rows)


def test_sdf_record_and_table_row_of_one_molecule_agree(shared_data: Path) -> None:
    records = sdf_records(shared_data / "cascade_dft8k.sdf.gz", limit=1000)
    rows = geometry_rows(shared_data / "cascade_dft8k.parquet", limit=1000)
    assert len(rows) == 1000
    for record, row in zip(records, rows, strict=True):
        from_record = molecule_from_molblock(record, CANONICAL)
        from_row = molecule_from_geometry(row, CANONICAL)
        assert same_graph(from_record, from_row), row.smiles
        assert isinstance(from_record, Molecule)
        assert isinstance(from_row, Molecule)
        np.testing.assert_allclose(from_record.positions, from_row.positions, atol=1e-4)


def test_records_of_many_rings_have_the_same_outcome_in_the_process_that_can_be_killed(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gzip.open(shared_data / "moleculenet" / "hiv.csv.gz", "rt") as file:
        smiles = [row["smiles"] for row in csv.DictReader(file)]
    records = [SmilesText(text) for text in smiles if smiles_may_be_slow(text)]
    assert 200 < len(records) < len(smiles) / 100
    records += [SmilesText(text) for text in smiles[::100]]
    outcomes = []
    for is_slow in (True, False):
        monkeypatch.setattr(featurizer, "may_be_slow", lambda record, is_slow=is_slow: is_slow)
        outcomes.append(molecules_from_records(records, CANONICAL))
    for there, here in zip(*outcomes, strict=True):
        assert_identical(there, here)


def test_every_qm9_sdf_record_featurizes(shared_data: Path) -> None:
    outcomes = [
        molecule_from_molblock(record, FeaturizeConfig(require_coordinates=True))
        for record in sdf_records(shared_data / "qm9_1000.sdf.gz")
    ]
    assert len(outcomes) == 1000
    assert all(isinstance(outcome, Molecule) for outcome in outcomes)


@pytest.mark.parametrize(
    ("name", "rows", "unparsable"),
    [
        ("bbbp", 2050, 11),
        ("tox21", 7831, 8),
        ("clintox", 1484, 4),
    ],
)
def test_unparsable_smiles_are_those_the_collection_lists(
    shared_data: Path, name: str, rows: int, unparsable: int
) -> None:
    with gzip.open(shared_data / "moleculenet" / f"{name}.csv.gz", "rt") as file:
        smiles = [row["smiles"] for row in csv.DictReader(file)]
    outcomes = [molecule_from_smiles(text, CONFIG) for text in smiles]
    codes = Counter(outcome.code for outcome in outcomes if not isinstance(outcome, Molecule))
    assert len(smiles) == rows
    assert codes == {RejectionCode.UNPARSABLE_SMILES: unparsable}
