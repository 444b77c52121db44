"""Every kind of source record gives a molecule, or a rejection that says why; never an exception."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem import rdDepictor, rdDistGeom

from moleblend_ray.chemistry.binary import to_binary
from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.conformers import ConformerStatus
from moleblend_ray.chemistry.features import graph_arrays
from moleblend_ray.chemistry.molecule import (
    Molecule,
    Outcome,
    molecule_from_geometry,
    molecule_from_molblock,
    molecule_from_smiles,
    molecules_from_records,
)
from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText, SourceRecord
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode

CONFIG = FeaturizeConfig()
GENERATE = FeaturizeConfig(conformers=ConformerConfig(generate=True))


def accepted(outcome: Outcome) -> Molecule:
    assert isinstance(outcome, Molecule), outcome
    return outcome


def rejected(outcome: Outcome) -> RejectionCode:
    assert isinstance(outcome, Rejection), outcome
    assert outcome.detail
    assert "\n" not in outcome.detail
    outcome.detail.encode()
    return outcome.code


def embedded(smiles: str, *, hydrogens: bool = True) -> Chem.Mol:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(mol, randomSeed=7) == 0
    return mol if hydrogens else Chem.RemoveHs(mol)


def row_of(mol: Chem.Mol, **changes: Any) -> GeometryRow:
    mol = Chem.Mol(mol)
    Chem.Kekulize(mol, clearAromaticFlags=True)
    row = GeometryRow(
        atomic_numbers=[atom.GetAtomicNum() for atom in mol.GetAtoms()],
        formal_charges=[atom.GetFormalCharge() for atom in mol.GetAtoms()],
        positions=mol.GetConformer().GetPositions().ravel().tolist(),
        bond_begin=[bond.GetBeginAtomIdx() for bond in mol.GetBonds()],
        bond_end=[bond.GetEndAtomIdx() for bond in mol.GetBonds()],
        bond_order=[int(bond.GetBondTypeAsDouble()) for bond in mol.GetBonds()],
    )
    return row._replace(**changes)


def molblock(lines: list[str], *, tag: str = "3D", num_bonds: int = 0) -> str:
    """A V2000 record of these atom (and bond) lines."""
    num_atoms = len(lines) - num_bonds
    counts = f"{num_atoms:3d}{num_bonds:3d}  0  0  0  0  0  0  0  0999 V2000"
    return "\n".join(["", f"     RDKit          {tag}", "", counts, *lines, "M  END", ""])


def atom_line(symbol: str, x: float, y: float, z: float) -> str:
    return f"{x:10.4f}{y:10.4f}{z:10.4f} {symbol:<3} 0  0  0  0  0  0  0  0  0  0  0  0"


# -- SMILES -------------------------------------------------------------------------------------------


def test_smiles_becomes_a_graph_without_coordinates() -> None:
    molecule = accepted(molecule_from_smiles("OCC", CONFIG))
    assert molecule.smiles == "CCO"
    assert molecule.atom_features[:, 0].tolist() == [7, 5, 5]  # in the order of the input
    assert molecule.bonds.tolist() == [[0, 1], [1, 2]]
    assert (molecule.num_atoms, molecule.num_bonds, molecule.num_conformers) == (3, 2, 0)
    assert molecule.positions.shape == (0, 3, 3)
    assert molecule.position_mask.shape == (0, 3)
    assert molecule.conformer_status is ConformerStatus.NONE


@pytest.mark.parametrize("smiles", [None, "", "  \n", float("nan"), 7, b"CCO"])
def test_a_missing_smiles_is_rejected(smiles: Any) -> None:
    assert rejected(molecule_from_smiles(smiles, CONFIG)) is RejectionCode.MISSING_SMILES


@pytest.mark.parametrize(
    ("smiles", "said"),
    [
        ("C1CC", "C1CC"),
        ("nonsense", "nonsense"),
        ("CN(C)(C)(C)C", "valence"),
        ("c1cccc1", "kekulize"),
        ("C\0C", "not a SMILES"),
        ("C\ud800", "C"),
        ("(" * 5000, "(((("),
        ("[R1]CC", "[R1]"),
    ],
)
def test_an_unparsable_smiles_is_rejected_with_the_reason(smiles: str, said: str) -> None:
    outcome = molecule_from_smiles(smiles, CONFIG)
    assert rejected(outcome) is RejectionCode.UNPARSABLE_SMILES
    assert isinstance(outcome, Rejection)
    assert said in outcome.detail
    assert len(outcome.detail) <= 200


def test_nothing_is_printed_for_bad_input(capfd: pytest.CaptureFixture[str]) -> None:
    molecule_from_smiles("C1CC", CONFIG)
    molecule_from_smiles("CN(C)(C)(C)C", CONFIG)
    molecule_from_molblock("garbage", CONFIG)
    output = capfd.readouterr()
    assert output.out + output.err == ""


@pytest.mark.parametrize("smiles", ["C", "[Na+]", "[Og]", "[H+]", "[CH3]", "[O]", "[2H]"])
def test_a_single_atom_is_a_molecule(smiles: str) -> None:
    molecule = accepted(molecule_from_smiles(smiles, CONFIG))
    assert molecule.num_atoms == 1
    assert molecule.bonds.shape == (0, 2)
    assert molecule.bond_features.shape == (0, 3)


def test_isotopic_hydrogen_stays_an_atom_and_ordinary_hydrogen_does_not() -> None:
    molecule = accepted(molecule_from_smiles("[2H]C([H])([H])O", CONFIG))
    assert molecule.atom_features[:, 0].tolist() == [0, 5, 7]


def test_radicals_and_hypervalent_atoms_are_kept_with_their_codes() -> None:
    radical = accepted(molecule_from_smiles("C[CH2]", CONFIG))
    assert radical.atom_features[1, 5] == 1
    hypervalent = accepted(molecule_from_smiles("FS(F)(F)(F)(F)F", CONFIG))
    assert hypervalent.atom_features[1, [2, 6]].tolist() == [6, 4]  # degree 6, SP3D2


def test_dummy_atoms_are_rejected_or_coded_as_other() -> None:
    assert rejected(molecule_from_smiles("*c1ccccc1", CONFIG)) is RejectionCode.UNSUPPORTED_ATOM
    molecule = accepted(molecule_from_smiles("*c1ccccc1", FeaturizeConfig(dummy_atoms="other")))
    assert molecule.atom_features[0, 0] == 118


def test_more_atoms_than_allowed_are_rejected_and_the_limit_itself_is_not() -> None:
    long = molecule_from_smiles("C" * 500, CONFIG)
    assert rejected(long) is RejectionCode.TOO_MANY_ATOMS
    assert isinstance(long, Rejection)
    assert "500" in long.detail
    assert "256" in long.detail
    assert (
        accepted(molecule_from_smiles("C" * 500, FeaturizeConfig(max_atoms=500))).num_atoms == 500
    )
    hydrogens = FeaturizeConfig(max_atoms=5, explicit_hydrogens=True)
    assert accepted(molecule_from_smiles("C", hydrogens)).num_atoms == 5
    assert rejected(molecule_from_smiles("CO", hydrogens)) is RejectionCode.TOO_MANY_ATOMS


def test_a_chain_of_a_hundred_thousand_atoms_is_rejected_without_harm() -> None:
    assert rejected(molecule_from_smiles("C" * 100_000, CONFIG)) is RejectionCode.TOO_MANY_ATOMS


def test_salts_are_kept_reduced_or_rejected() -> None:
    salt = "CC(=O)[O-].[Na+]"
    assert accepted(molecule_from_smiles(salt, CONFIG)).smiles == salt
    largest = FeaturizeConfig(salts="largest_fragment")
    assert accepted(molecule_from_smiles(salt, largest)).smiles == "CC(=O)[O-]"
    assert accepted(molecule_from_smiles("CC.CO.[Br-]", largest)).smiles == "CO"  # more mass
    assert accepted(molecule_from_smiles("OC.CO", largest)).smiles == "CO"
    reject = FeaturizeConfig(salts="reject")
    assert rejected(molecule_from_smiles(salt, reject)) is RejectionCode.MULTIPLE_FRAGMENTS
    assert accepted(molecule_from_smiles("CCO", reject)).smiles == "CCO"


def test_explicit_hydrogens_are_atoms() -> None:
    molecule = accepted(molecule_from_smiles("CO", FeaturizeConfig(explicit_hydrogens=True)))
    assert molecule.atom_features[:, 0].tolist() == [5, 7, 0, 0, 0, 0]
    assert molecule.num_bonds == 5


def test_required_coordinates_reject_a_bare_smiles() -> None:
    config = FeaturizeConfig(require_coordinates=True)
    assert rejected(molecule_from_smiles("CCO", config)) is RejectionCode.NO_COORDINATES


def test_canonical_order_makes_two_spellings_one_record() -> None:
    config = FeaturizeConfig(canonical_order=True)
    first = accepted(molecule_from_smiles("OC(=O)[C@@H](N)C/C=C/c1ccccc1", config))
    second = accepted(molecule_from_smiles("c1ccccc1/C=C/C[C@H](N)C(O)=O", config))
    assert first.smiles == second.smiles
    np.testing.assert_array_equal(first.atom_features, second.atom_features)
    np.testing.assert_array_equal(first.bonds, second.bonds)
    np.testing.assert_array_equal(first.bond_features, second.bond_features)


def test_canonical_order_moves_coordinates_and_hydrogens_with_their_atoms() -> None:
    mol = embedded("OC(=O)[C@@H](N)Cc1ccccc1")
    for hydrogens in (False, True):
        source = accepted(
            molecule_from_geometry(row_of(mol), FeaturizeConfig(explicit_hydrogens=hydrogens))
        )
        config = FeaturizeConfig(explicit_hydrogens=hydrogens, canonical_order=True)
        canonical = accepted(molecule_from_geometry(row_of(mol), config))
        assert canonical.smiles == source.smiles
        assert bond_lengths(canonical) == bond_lengths(source)
        keep = FeaturizeConfig(explicit_hydrogens=hydrogens)
        if not hydrogens:
            again = accepted(molecule_from_smiles(source.smiles, keep))
            np.testing.assert_array_equal(canonical.atom_features, again.atom_features)


def bond_lengths(molecule: Molecule) -> list[tuple[tuple[int, ...], float]]:
    """Elements and length of each bond: equal only if the coordinates stayed with their atoms."""
    elements = molecule.atom_features[:, 0]
    pairs = molecule.positions[0][molecule.bonds]
    lengths = np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=-1).round(4)
    return sorted(
        (tuple(sorted(elements[bond].tolist())), float(length))
        for bond, length in zip(molecule.bonds, lengths, strict=True)
    )


# -- SDF records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("v3000", [False, True])
def test_an_sdf_record_keeps_the_coordinates_and_stereo_of_its_heavy_atoms(v3000: bool) -> None:
    mol = embedded("C[C@H](N)C(=O)O")
    block = Chem.MolToMolBlock(mol, forceV3000=v3000)
    molecule = accepted(molecule_from_molblock(block, CONFIG))
    assert molecule.smiles == "C[C@H](N)C(=O)O"
    assert molecule.conformer_status is ConformerStatus.SOURCE
    np.testing.assert_allclose(
        molecule.positions[0], mol.GetConformer().GetPositions()[:6], atol=1e-4
    )
    assert molecule.position_mask.all()


def test_what_follows_the_record_and_its_line_ends_do_not_matter() -> None:
    block = Chem.MolToMolBlock(embedded("CCO")) + "> <name>\nethanol\n\n"
    first = accepted(molecule_from_molblock(block, CONFIG))
    second = accepted(molecule_from_molblock(block.replace("\n", "\r\n"), CONFIG))
    assert first.smiles == second.smiles == "CCO"
    np.testing.assert_array_equal(first.positions, second.positions)


def test_a_depiction_has_no_coordinates_but_its_wedges_count() -> None:
    mol = Chem.MolFromSmiles("C[C@H](N)C(=O)O")
    rdDepictor.Compute2DCoords(mol)
    molecule = accepted(molecule_from_molblock(Chem.MolToMolBlock(mol), CONFIG))
    assert molecule.smiles == "C[C@H](N)C(=O)O"
    assert molecule.conformer_status is ConformerStatus.NONE
    assert molecule.num_conformers == 0
    config = FeaturizeConfig(require_coordinates=True)
    outcome = molecule_from_molblock(Chem.MolToMolBlock(mol), config)
    assert rejected(outcome) is RejectionCode.NO_COORDINATES


def test_a_record_with_all_atoms_in_the_origin_has_no_coordinates() -> None:
    lines = [atom_line("C", 0, 0, 0), atom_line("O", 0, 0, 0), "  1  2  1  0"]
    molecule = accepted(molecule_from_molblock(molblock(lines, num_bonds=1), CONFIG))
    assert molecule.smiles == "CO"
    assert molecule.num_conformers == 0


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf"])
def test_a_record_with_a_coordinate_that_is_no_number_is_rejected(value: str) -> None:
    lines = [atom_line("C", 0, 0, 0), atom_line("O", 1.4, 0, 0), "  1  2  1  0"]
    lines[1] = f"{value:>10}" + lines[1][10:]
    outcome = molecule_from_molblock(molblock(lines, num_bonds=1), CONFIG)
    assert rejected(outcome) is RejectionCode.NON_FINITE_COORDINATES


def test_a_record_of_one_atom_in_the_origin_keeps_its_coordinate() -> None:
    molecule = accepted(molecule_from_molblock(molblock([atom_line("Ne", 0, 0, 0)]), CONFIG))
    assert molecule.position_mask.tolist() == [[True]]
    assert molecule.positions.tolist() == [[[0.0, 0.0, 0.0]]]


def test_a_flat_molecule_marked_3d_has_coordinates_and_unmarked_has_none() -> None:
    lines = [atom_line("C", 0, 0, 0), atom_line("O", 1.2, 0, 0), "  1  2  2  0"]
    assert (
        accepted(molecule_from_molblock(molblock(lines, num_bonds=1), CONFIG)).num_conformers == 1
    )
    unmarked = molblock(lines, num_bonds=1, tag="  ")
    assert accepted(molecule_from_molblock(unmarked, CONFIG)).num_conformers == 0


def test_geometry_decides_a_double_bond_that_the_record_leaves_open() -> None:
    mol = embedded("C/C=C/C")
    mol.GetBondWithIdx(1).SetStereo(Chem.BondStereo.STEREOANY)
    block = Chem.MolToMolBlock(mol)
    assert any(line.split() == ["2", "3", "2", "3"] for line in block.splitlines())
    molecule = accepted(molecule_from_molblock(block, CONFIG))
    assert molecule.smiles == "C/C=C/C"
    assert 5 not in molecule.bond_features[:, 1]


def test_a_nearly_flat_record_marked_3d_with_an_open_double_bond_has_coordinates() -> None:
    atoms = [(-1.9, 0.3, 0.0002), (-0.6, -0.2, 0.0), (0.6, 0.2, 0.0), (1.9, -0.3, -0.0003)]
    lines = [
        *(atom_line(symbol, *xyz) for symbol, xyz in zip("CNNC", atoms, strict=True)),
        "  1  2  1  0",
        "  2  3  2  3",
        "  3  4  1  0",
    ]
    molecule = accepted(molecule_from_molblock(molblock(lines, num_bonds=3), CONFIG))
    assert molecule.num_conformers == 1
    assert molecule.smiles == "C/N=N/C"


def test_coordinates_that_no_molecule_has_are_rejected_with_the_atom() -> None:
    block = molblock([atom_line("C", 0, 0, 1), atom_line("C", 0, 0, 2)])
    assert accepted(molecule_from_molblock(block, CONFIG)).num_conformers == 1
    far = row_of(embedded("C"), positions=[1e5] + [1.0] * 14)
    assert accepted(molecule_from_geometry(far, CONFIG)).num_conformers == 1
    # The squares of such distances are infinite in single precision.
    for value in (-1e20, 1e39):
        row = row_of(embedded("C"), positions=[1.0] * 4 + [value] + [1.0] * 10)
        outcome = molecule_from_geometry(row, CONFIG)
        assert rejected(outcome) is RejectionCode.IMPLAUSIBLE_COORDINATES
        assert isinstance(outcome, Rejection)
        assert outcome.detail.startswith("atom 1 is at [1.0, ")


def test_an_atom_that_loses_its_hydrogens_loses_a_chirality_they_gave() -> None:
    # Two of four neighbours are hydrogens, and the record is flat enough for RDKit to see a centre.
    mol = Chem.MolFromSmiles("CCC")
    mol.GetAtomWithIdx(1).SetChiralTag(Chem.ChiralType.CHI_TETRAHEDRAL_CW)
    assert not graph_arrays([to_binary(mol)])[0].atom_features[:, 1].any()


def test_dative_bonds_close_no_ring_in_a_record_either() -> None:
    block = Chem.MolToMolBlock(embedded("C1CN->[Zn]<-N1"), forceV3000=True)
    molecule = accepted(molecule_from_molblock(block, CONFIG))
    assert not molecule.atom_features[:, 8].any()
    from_text = accepted(molecule_from_smiles(molecule.smiles, CONFIG))
    assert not from_text.atom_features[:, 8].any()


@pytest.mark.parametrize(
    ("smiles", "atoms"), [("C1CC1" * 3000, 9000), ("C" * 1_000_000, 1_000_000), ("C1" * 200_000, 0)]
)
def test_a_text_far_too_long_is_turned_away_before_rdkit_labours_over_it(
    smiles: str, atoms: int
) -> None:
    began = time.process_time()
    outcome = molecule_from_smiles(smiles, CONFIG)
    assert time.process_time() - began < 5
    assert rejected(outcome) is RejectionCode.TOO_MANY_ATOMS
    assert isinstance(outcome, Rejection)
    assert str(atoms or len(smiles)) in outcome.detail


def test_small_fragments_of_a_long_text_are_kept_if_salts_are_dropped() -> None:
    smiles = ".".join(["CCO"] * 520)
    largest = FeaturizeConfig(salts="largest_fragment")
    assert accepted(molecule_from_smiles(smiles, largest)).smiles == "CCO"
    assert rejected(molecule_from_smiles(smiles, CONFIG)) is RejectionCode.TOO_MANY_ATOMS


@pytest.mark.parametrize("block", [None, "", "\n\n\n", "garbage", "a\nb\nc\nd\ne\n", "\0" * 50, 3])
def test_garbage_instead_of_a_record_is_rejected(block: Any) -> None:
    assert rejected(molecule_from_molblock(block, CONFIG)) is RejectionCode.INVALID_RECORD


def test_a_truncated_record_is_rejected() -> None:
    block = Chem.MolToMolBlock(embedded("CCO"))
    for end in range(0, len(block.partition("M  END")[0]), 37):
        assert isinstance(molecule_from_molblock(block[:end], CONFIG), Rejection)


def test_a_record_of_no_atoms_and_one_of_impossible_chemistry_say_so() -> None:
    assert rejected(molecule_from_molblock(molblock([]), CONFIG)) is RejectionCode.EMPTY_MOLECULE
    lines = [atom_line("F", k, 0, 0) for k in range(3)] + ["  1  2  1  0", "  2  3  1  0"]
    outcome = molecule_from_molblock(molblock(lines, num_bonds=2), CONFIG)
    assert rejected(outcome) is RejectionCode.SANITIZATION_FAILED
    assert isinstance(outcome, Rejection)
    assert "valence" in outcome.detail


def test_hydrogens_added_to_a_record_that_lacks_them_have_no_coordinates() -> None:
    block = Chem.MolToMolBlock(embedded("CO", hydrogens=False))
    config = FeaturizeConfig(explicit_hydrogens=True)
    molecule = accepted(molecule_from_molblock(block, config))
    assert molecule.position_mask.tolist() == [[True, True, False, False, False, False]]
    assert not molecule.positions[0, 2:].any()
    complete = accepted(molecule_from_molblock(Chem.MolToMolBlock(embedded("CO")), config))
    assert complete.position_mask.all()


# -- table rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hydrogens", [True, False])
@pytest.mark.parametrize("smiles", ["C[C@H](N)C(=O)[O-]", "C/C=C\\C", "c1cc[nH]c1", "C[N+](C)(C)C"])
def test_a_geometry_row_is_the_molecule_of_its_smiles(smiles: str, hydrogens: bool) -> None:
    mol = embedded(smiles, hydrogens=hydrogens)
    molecule = accepted(molecule_from_geometry(row_of(mol), CONFIG))
    expected = accepted(molecule_from_smiles(smiles, CONFIG))
    assert molecule.smiles == Chem.CanonSmiles(smiles)
    columns = [0, 2, 3, 4, 5, 6, 7, 8]  # chirality codes depend on the order of bonds
    np.testing.assert_array_equal(
        molecule.atom_features[:, columns], expected.atom_features[:, columns]
    )
    positions = mol.GetConformer().GetPositions()[: molecule.num_atoms]
    np.testing.assert_array_equal(molecule.positions[0], positions.astype(np.float32))


def test_arrays_and_lists_are_the_same_row() -> None:
    row = row_of(embedded("CCO"))
    arrays = GeometryRow(
        np.array(row.atomic_numbers, dtype=np.uint8),
        np.array(row.formal_charges, dtype=np.int8),
        np.array(row.positions, dtype=np.float32).reshape(-1, 3),
        np.array(row.bond_begin, dtype=np.int32),
        np.array(row.bond_end, dtype=np.int32),
        np.array(row.bond_order, dtype=np.int32),
    )
    first = accepted(molecule_from_geometry(row, CONFIG))
    second = accepted(molecule_from_geometry(arrays, CONFIG))
    np.testing.assert_array_equal(first.atom_features, second.atom_features)
    np.testing.assert_allclose(first.positions, second.positions, atol=1e-6)


def test_an_atom_in_the_origin_keeps_its_coordinate() -> None:
    mol = embedded("CCO")
    positions = mol.GetConformer().GetPositions()
    positions -= positions[1]
    molecule = accepted(molecule_from_geometry(row_of(mol, positions=positions), CONFIG))
    assert molecule.positions[0, 1].tolist() == [0.0, 0.0, 0.0]
    assert molecule.position_mask.all()
    alone = GeometryRow([10], [0], [0.0, 0.0, 0.0], [], [], [])
    assert accepted(molecule_from_geometry(alone, CONFIG)).position_mask.tolist() == [[True]]


@pytest.mark.parametrize("positions", [None, [], [0.0] * 27])
def test_a_row_without_coordinates_is_kept_without(positions: list[float] | None) -> None:
    row = row_of(embedded("CCO"), positions=positions)
    molecule = accepted(molecule_from_geometry(row, CONFIG))
    assert molecule.smiles == "CCO"
    assert molecule.num_conformers == 0
    assert molecule.conformer_status is ConformerStatus.NONE


def test_a_row_without_coordinates_takes_the_stereo_of_its_smiles() -> None:
    row = row_of(embedded("C[C@H](N)C(=O)O"), positions=None, smiles="C[C@H](N)C(=O)O")
    assert accepted(molecule_from_geometry(row, CONFIG)).smiles == "C[C@H](N)C(=O)O"
    row = row_of(embedded("C[C@H](N)C(=O)O"), positions=None)
    assert accepted(molecule_from_geometry(row, CONFIG)).smiles == "CC(N)C(=O)O"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"positions": [float("nan")] + [1.0] * 26}, RejectionCode.NON_FINITE_COORDINATES),
        ({"positions": [1.0] * 26 + [float("inf")]}, RejectionCode.NON_FINITE_COORDINATES),
        ({"positions": [1.0] * 26}, RejectionCode.INVALID_RECORD),
        ({"positions": ["x"] * 27}, RejectionCode.INVALID_RECORD),
        ({"formal_charges": [0]}, RejectionCode.INVALID_RECORD),
        ({"bond_order": [1]}, RejectionCode.INVALID_RECORD),
        ({"bond_order": [4] * 8}, RejectionCode.INVALID_RECORD),
        ({"bond_begin": [99] * 8}, RejectionCode.INVALID_RECORD),
        ({"bond_begin": [-1] * 8}, RejectionCode.INVALID_RECORD),
        ({"bond_begin": [0] * 8, "bond_end": [1] * 8}, RejectionCode.INVALID_RECORD),
        ({"bond_begin": [0] * 8, "bond_end": [0] * 8}, RejectionCode.INVALID_RECORD),
        ({"bond_order": [3] * 8}, RejectionCode.SANITIZATION_FAILED),
        ({"atomic_numbers": [200] * 9}, RejectionCode.UNSUPPORTED_ATOM),
        ({"atomic_numbers": [0] * 9}, RejectionCode.UNSUPPORTED_ATOM),
        ({"atomic_numbers": None}, RejectionCode.INVALID_RECORD),
        ({"atomic_numbers": ["C"] * 9}, RejectionCode.INVALID_RECORD),
    ],
)
def test_a_malformed_row_is_rejected_with_its_reason(
    changes: dict[str, Any], code: RejectionCode
) -> None:
    assert rejected(molecule_from_geometry(row_of(embedded("CCO"), **changes), CONFIG)) is code


def test_an_empty_row_is_an_empty_molecule() -> None:
    row = GeometryRow([], [], [], [], [], [])
    assert rejected(molecule_from_geometry(row, CONFIG)) is RejectionCode.EMPTY_MOLECULE


# -- conformers ---------------------------------------------------------------------------------------


def test_conformers_are_made_only_where_the_source_has_none() -> None:
    made = accepted(molecule_from_smiles("CCO", GENERATE))
    assert made.conformer_status is ConformerStatus.RELAXED
    assert made.positions.shape == (1, 3, 3)
    assert made.position_mask.all()
    mol = embedded("CCO")
    kept = accepted(molecule_from_geometry(row_of(mol), GENERATE))
    assert kept.conformer_status is ConformerStatus.SOURCE
    depiction = Chem.MolFromSmiles("CCO")
    rdDepictor.Compute2DCoords(depiction)
    drawn = accepted(molecule_from_molblock(Chem.MolToMolBlock(depiction), GENERATE))
    assert drawn.conformer_status is ConformerStatus.RELAXED


def test_a_molecule_that_cannot_be_embedded_is_kept_flat_or_rejected_never_silently() -> None:
    smiles = "C1#CC1"  # no geometry satisfies a triple bond in a ring of three
    kept = accepted(molecule_from_smiles(smiles, GENERATE))
    assert kept.conformer_status is ConformerStatus.FAILED
    assert kept.num_conformers == 0
    reject = FeaturizeConfig(conformers=ConformerConfig(generate=True, on_failure="reject"))
    assert rejected(molecule_from_smiles(smiles, reject)) is RejectionCode.CONFORMER_FAILED
    required = FeaturizeConfig(require_coordinates=True, conformers=ConformerConfig(generate=True))
    assert rejected(molecule_from_smiles(smiles, required)) is RejectionCode.CONFORMER_FAILED


# -- many at once -------------------------------------------------------------------------------------


def test_records_at_once_have_the_outcomes_that_each_has_alone() -> None:
    block = Chem.MolToMolBlock(embedded("C[C@H](N)C(=O)O"))
    refused = Rejection(code=RejectionCode.INVALID_RECORD, detail="refused before")
    kinds: list[SourceRecord | Rejection] = [
        SmilesText("c1ccccc1"),
        SmilesText("C(C"),
        MolBlock(block),
        SmilesText("*C"),
        row_of(embedded("CCO")),
        refused,
        MolBlock("no record"),
        SmilesText("C" * 300),
    ]
    records = kinds * 13  # several batches, the last one not full
    together = molecules_from_records(iter(records), CONFIG)
    alone = [molecules_from_records([record], CONFIG)[0] for record in kinds] * 13
    for found, expected in zip(together, alone, strict=True):
        if isinstance(expected, Rejection):
            assert found == expected
            continue
        assert accepted(found).smiles == expected.smiles
        for name in ("atom_features", "bonds", "bond_features", "positions", "position_mask"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


# -- anything -----------------------------------------------------------------------------------------


def assert_sound(outcome: Outcome) -> None:
    """Check what is guaranteed for every outcome, whatever the input."""
    if isinstance(outcome, Rejection):
        assert outcome.detail
        outcome.detail.encode()
        return
    n, e, c = outcome.num_atoms, outcome.num_bonds, outcome.num_conformers
    assert 1 <= n <= CONFIG.max_atoms
    assert outcome.atom_features.shape == (n, 9)
    assert outcome.bonds.shape == (e, 2)
    assert outcome.bond_features.shape == (e, 3)
    assert (outcome.bonds < n).all()
    assert outcome.positions.shape == (c, n, 3)
    assert outcome.position_mask.shape == (c, n)
    assert np.isfinite(outcome.positions).all()
    outcome.smiles.encode()


@settings(max_examples=150)
@given(st.text(max_size=40))
def test_no_text_raises(text: str) -> None:
    assert_sound(molecule_from_smiles(text, CONFIG))
    assert_sound(molecule_from_molblock(text, CONFIG))


@settings(max_examples=300)
@given(st.text(alphabet="CNOSPFclnos[]()=#$:.-+/\\@H123%*~<>", max_size=30))
def test_nothing_that_looks_like_a_smiles_raises(text: str) -> None:
    assert_sound(molecule_from_smiles(text, CONFIG))


BLOCK = Chem.MolToMolBlock(embedded("C[C@H](N)C(=O)O"))


@settings(max_examples=150)
@given(
    st.integers(0, len(BLOCK) - 1), st.text(max_size=6), st.integers(0, 6), st.sampled_from([0, 1])
)
def test_no_damaged_record_raises(start: int, text: str, removed: int, crlf: int) -> None:
    block = BLOCK[:start] + text + BLOCK[start + removed :]
    assert_sound(molecule_from_molblock(block.replace("\n", "\r\n") if crlf else block, CONFIG))


@settings(max_examples=150)
@given(
    numbers=st.lists(st.integers(-1, 120), max_size=5),
    charges=st.lists(st.integers(-9, 9), max_size=5),
    positions=st.none() | st.lists(st.floats(width=32), max_size=15),
    bonds=st.lists(
        st.tuples(st.integers(-1, 5), st.integers(-1, 5), st.integers(0, 4)), max_size=5
    ),
)
def test_no_row_raises(
    numbers: list[int],
    charges: list[int],
    positions: list[float] | None,
    bonds: list[tuple[int, int, int]],
) -> None:
    begin, end, order = ([bond[k] for bond in bonds] for k in range(3))
    charges = (charges + [0] * len(numbers))[: len(numbers)]
    assert_sound(
        molecule_from_geometry(GeometryRow(numbers, charges, positions, begin, end, order), CONFIG)
    )
