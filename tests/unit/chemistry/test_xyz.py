"""Files of QM9: properties with their units, and bonds derived from geometry and SMILES."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_geometry
from moleblend_ray.chemistry.records import GeometryRow
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.chemistry.xyz import QM9_PROPERTIES, XyzRecord, bonded_geometry, parse_xyz

METHANE = """5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t-40.47893\t-40.476062\t-40.475117\t-40.498597\t6.469\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 2.765748*^-4\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


def parsed(text: str) -> XyzRecord:
    record = parse_xyz(text)
    assert isinstance(record, XyzRecord), record
    return record


def row_of(record: XyzRecord) -> GeometryRow:
    row = bonded_geometry(record)
    assert isinstance(row, GeometryRow), row
    return row


def embedded(smiles: str, *, shuffle: bool, label: str | None = None) -> XyzRecord:
    """A geometry of the molecule by RDKit, with hydrogens; with ``shuffle``, its atoms in another order."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(mol, randomSeed=7) == 0
    order = np.arange(mol.GetNumAtoms())
    if shuffle:
        np.random.default_rng(3).shuffle(order)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.int32)
    positions = mol.GetConformer().GetPositions()
    return XyzRecord(1, numbers[order], positions[order], {}, (label or smiles,))


def smiles_of(row: GeometryRow) -> str:
    molecule = molecule_from_geometry(row, FeaturizeConfig())
    assert isinstance(molecule, Molecule), molecule
    return molecule.smiles


def test_a_published_file_is_read_with_all_properties() -> None:
    record = parsed(METHANE)
    assert record.number == 1
    assert record.smiles == ("C",)
    assert list(record.properties) == list(QM9_PROPERTIES)
    assert record.properties["A"] == 157.7118
    assert record.properties["mu"] == 0.0
    assert record.properties["gap"] == 0.5048
    assert record.properties["u0"] == -40.47893
    assert record.properties["cv"] == 6.469
    assert record.positions[2, 2] == 2.765748e-4  # spelled 2.765748*^-4
    row = row_of(record)
    assert sorted(zip(row.bond_begin, row.bond_end, row.bond_order, strict=True)) == [
        (0, hydrogen, 1) for hydrogen in range(1, 5)
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "smiles",
    [
        "O",
        "C#N",
        "CC(=O)N",
        "c1ccoc1",
        "C1=CC=CC=CC=C1",  # only bond lengths tell which bonds are double
        "[NH3+]CC(=O)[O-]",
        "C12C3C4C1C5C2C3C45",
        "FC(F)(F)c1ccccn1",
        "C[C@H](N)C(=O)O",
        "N#CC(=O)/C=C/O",
    ],
)
def test_bonds_are_found_again_whatever_the_order_of_atoms(smiles: str, shuffle: bool) -> None:
    record = embedded(smiles, shuffle=shuffle)
    expected = Chem.MolFromSmiles(smiles)
    found = Chem.MolFromSmiles(smiles_of(row_of(record)))
    Chem.RemoveStereochemistry(expected)
    Chem.RemoveStereochemistry(found)
    assert Chem.MolToSmiles(found) == Chem.MolToSmiles(expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_of_several_mappings_the_short_bonds_become_double(shuffle: bool) -> None:
    record = embedded("C1=CC=CC=CC=C1", shuffle=shuffle)
    row = row_of(record)
    bonds = np.array([row.bond_begin, row.bond_end]).T
    ends = record.positions[bonds]
    lengths = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1)
    order = np.asarray(row.bond_order)
    between_carbons = (record.atomic_numbers[bonds] == 6).all(axis=1)
    assert lengths[order == 2].max() < lengths[(order == 1) & between_carbons].min()


def test_the_smiles_of_the_drawing_is_used_if_that_of_the_relaxed_geometry_does_not_fit() -> None:
    text = METHANE.replace("C\tC\t\n", "C\tCC\t\n")
    assert parsed(text).smiles == ("CC", "C")
    assert smiles_of(row_of(parsed(text))) == "C"


@pytest.mark.parametrize("label", ["CC=O", "C1CO1", "OC=C", "no SMILES", ""])
def test_a_geometry_of_another_molecule_is_a_mismatch(label: str) -> None:
    record = embedded("C=CO", shuffle=False)._replace(smiles=(label,) if label else ())
    outcome = bonded_geometry(record)
    if label == "OC=C":
        assert isinstance(outcome, GeometryRow)
        return
    assert isinstance(outcome, Rejection)
    assert outcome.code == "geometry_mismatch"
    assert (label or "no SMILES") in outcome.detail


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5\n",
        "x\n" + METHANE,
        METHANE.replace("gdb 1", "mol 1"),
        METHANE.replace("\t6.469\t", ""),
        METHANE.replace("H\t 0.002150416", "Xx\t 0.002150416"),
        METHANE.replace("\t 1.0858041578", "\t one"),
        METHANE.replace("5\ngdb", "50\ngdb"),
    ],
)
def test_a_malformed_file_is_an_invalid_record(text: str) -> None:
    outcome = parse_xyz(text)
    assert isinstance(outcome, Rejection)
    assert outcome.code == "invalid_record"


def test_coordinates_that_are_not_finite_are_told() -> None:
    outcome = bonded_geometry(parsed(METHANE.replace("-0.0126981359", "nan")))
    assert isinstance(outcome, Rejection)
    assert outcome.code == "non_finite_coordinates"


@pytest.mark.shared_data
def test_the_bonds_of_real_molecules_are_found_again(shared_data: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(shared_data / "qm9.parquet").read_row_group(7).slice(0, 400)
    assert table.num_rows == 400
    for row in table.to_pylist():
        known = GeometryRow(*(row[name] for name in GeometryRow._fields[:-1]))
        record = XyzRecord(
            1,
            np.array(row["atomic_numbers"], np.int32),
            np.array(row["positions"], dtype=np.float64).reshape(-1, 3),
            {},
            (row["smiles"],),
        )
        assert smiles_of(row_of(record)) == smiles_of(known), row["smiles"]
