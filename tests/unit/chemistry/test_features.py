"""The fast featurizer gives the same codes as looking up every value in the published vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from rdkit import Chem

from moleblend_ray.chemistry import binary
from moleblend_ray.chemistry.features import (
    _TABLES,
    GraphArrays,
    graph_arrays,
    graph_arrays_by_getters,
)
from moleblend_ray.chemistry.samples import make_samples
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES

# OGB 1.3.6: each list as published; the last entry stands for all other values.
ELEMENTS = [*range(1, 119), "misc"]
CHIRALITIES = ["CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER", "misc"]
DEGREES = [*range(11), "misc"]
CHARGES = [*range(-5, 6), "misc"]
HYDROGENS = [*range(9), "misc"]
RADICALS = [*range(5), "misc"]
HYBRIDIZATIONS = ["SP", "SP2", "SP3", "SP3D", "SP3D2", "misc"]
BOOLEANS = [False, True]
BOND_TYPES = ["SINGLE", "DOUBLE", "TRIPLE", "AROMATIC", "misc"]
STEREOS = ["STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY"]

ODD_SMILES = [
    "C",
    "[H][H]",
    "[H+]",
    "[2H]C([2H])([2H])O",
    "[13CH3]C",
    "[CH3]",
    "[O]",
    "[C]",
    "[Og]",
    "[U]",
    "*C",
    "CC(=O)[O-].[Na+]",
    "C[N+](C)(C)C",
    "[Fe+6]",
    "[C-4]",
    "[Mn-6]",
    "F/C=C/F",
    "F/C=C\\F",
    "CC=CC",
    "CC(C)=C=C",
    "CC=[C@]=CC",
    "C[C@H](N)C(=O)O",
    "C[C@@H](N)C(=O)O",
    "C[S@](=O)CC",
    "C[P@](=O)(O)CC",
    "O[C@H]1CC[C@@H](O)CC1",
    "C[N@]1CC1C",
    "FS(F)(F)(F)(F)F",
    "FP(F)(F)(F)F",
    "FI(F)(F)(F)F",
    "OCl(=O)(=O)=O",
    "C#N",
    "[C-]#[O+]",
    "c1ccccc1",
    "c1cc[nH]c1",
    "c1ccc2ccccc2c1",
    "C1=CC=C[CH-]1.[Fe+2]",
    "B1OBOBO1",
    "N->[Zn]",
    "CC(=O)O->[Zn]<-N",
    "C$C",
    "Cl[Pt@SP1](F)(Br)I",
    "[Co@OH1](F)(Cl)(Br)(I)(N)O",
    "O=[As](O)(O)O",
    "[SiH4]",
    "[Xe](F)F",
    "C12C3C4C1C5C2C3C45",
    "[NH4+].[Cl-]",
]


def code(values: Sequence[object], value: object) -> int:
    return values.index(value) if value in values else len(values) - 1


def slow_atom_features(mol: Chem.Mol) -> np.ndarray:
    return np.array(
        [
            [
                code(ELEMENTS, atom.GetAtomicNum()),
                code(CHIRALITIES, str(atom.GetChiralTag())),
                code(DEGREES, atom.GetTotalDegree()),
                code(CHARGES, atom.GetFormalCharge()),
                code(HYDROGENS, atom.GetTotalNumHs()),
                code(RADICALS, atom.GetNumRadicalElectrons()),
                code(HYBRIDIZATIONS, str(atom.GetHybridization())),
                code(BOOLEANS, atom.GetIsAromatic()),
                code(BOOLEANS, atom.IsInRing()),
            ]
            for atom in mol.GetAtoms()
        ]
    )


def slow_bond_features(mol: Chem.Mol) -> np.ndarray:
    return np.array(
        [
            [
                code(BOND_TYPES, str(bond.GetBondType())),
                code(STEREOS, str(bond.GetStereo())),
                code(BOOLEANS, bond.GetIsConjugated()),
            ]
            for bond in mol.GetBonds()
        ]
    ).reshape(-1, 3)


def arrays_of(mol: Chem.Mol) -> GraphArrays:
    return graph_arrays([binary.to_binary(mol)])[0]


def assert_same_codes(mol: Chem.Mol) -> None:
    ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]
    for found in (arrays_of(mol), graph_arrays_by_getters(mol)):
        np.testing.assert_array_equal(found.atom_features, slow_atom_features(mol))
        np.testing.assert_array_equal(found.bond_features, slow_bond_features(mol))
        np.testing.assert_array_equal(found.bonds, np.array(ends).reshape(-1, 2))


@pytest.mark.parametrize("smiles", ODD_SMILES)
def test_odd_molecules_get_the_published_codes(smiles: str) -> None:
    assert_same_codes(Chem.MolFromSmiles(smiles))


def test_drug_like_molecules_get_the_published_codes() -> None:
    samples = list(make_samples(60, seed=3, num_processes=1))
    assert len(samples) == 60
    for sample in samples:
        assert_same_codes(Chem.MolFromSmiles(sample.smiles))


def test_molecules_with_explicit_hydrogens_get_the_published_codes() -> None:
    for smiles in ODD_SMILES:
        assert_same_codes(Chem.AddHs(Chem.MolFromSmiles(smiles)))


def test_codes_stay_within_their_vocabularies_and_arrays_are_writable() -> None:
    for smiles in ODD_SMILES:
        mol = Chem.MolFromSmiles(smiles)
        atoms, bonds, bond_features = arrays_of(mol)
        assert atoms.shape == (mol.GetNumAtoms(), 9)
        assert atoms.dtype == np.uint8
        assert bonds.dtype == np.uint16
        assert bond_features.dtype == np.uint8
        assert (atoms < np.array(ATOM_VOCAB_SIZES)).all()
        assert (bond_features < np.array(BOND_VOCAB_SIZES)).all()
        assert atoms.flags.c_contiguous
        assert atoms.flags.writeable


def test_exotic_bond_types_have_the_code_other() -> None:
    dative = arrays_of(Chem.MolFromSmiles("N->[Zn]")).bond_features
    quadruple = arrays_of(Chem.MolFromSmiles("C$C")).bond_features
    assert dative[0, 0] == 4
    assert quadruple[0, 0] == 4


@pytest.mark.parametrize("kind", [Chem.BondType.HYDROGEN, Chem.BondType.ZERO])
def test_bonds_without_an_order_have_the_code_other(kind: Chem.BondType) -> None:
    mol = Chem.RWMol(Chem.MolFromSmiles("O.O"))
    mol.AddBond(0, 1, kind)
    Chem.SanitizeMol(mol, Chem.SANITIZE_SYMMRINGS)
    assert arrays_of(mol).bond_features[0, 0] == 4


def test_dummy_atoms_have_the_code_other_and_oganesson_its_own() -> None:
    assert arrays_of(Chem.MolFromSmiles("*")).atom_features[0, 0] == 118
    assert arrays_of(Chem.MolFromSmiles("[Og]")).atom_features[0, 0] == 117


def test_undecided_double_bond_stereo_has_its_own_code() -> None:
    mol = Chem.MolFromSmiles("CC=CC")
    mol.GetBondWithIdx(1).SetStereo(Chem.BondStereo.STEREOANY)
    assert arrays_of(mol).bond_features[1].tolist() == [1, 5, 0]


def test_many_molecules_at_once_give_each_its_own_arrays() -> None:
    # Some of these molecules have parts in their binary form that only the getters read.
    mols = [
        Chem.MolFromSmiles(text) for text in ("CO", "[CH3:1]O", "c1ccccc1", "*C", "C" * 300, "CN")
    ]
    for mol, found in zip(mols, graph_arrays([binary.to_binary(mol) for mol in mols]), strict=True):
        np.testing.assert_array_equal(found.atom_features, slow_atom_features(mol))
        np.testing.assert_array_equal(found.bond_features, slow_bond_features(mol))
    assert graph_arrays([]) == []


def test_rdkit_writes_the_binary_format_that_is_read_without_getters() -> None:
    assert binary.is_known_format()
    mol = Chem.MolFromSmiles("C[C@H](N)C(=O)/C=C/c1ccccc1")
    assert binary.decode_graphs([binary.to_binary(mol)], _TABLES, 1).is_known.all()


def test_another_version_of_the_binary_format_is_left_to_the_getters() -> None:
    written = bytearray(binary.to_binary(Chem.MolFromSmiles("CCO")))
    written[8] += 1  # the major version
    assert not binary.decode_graphs([bytes(written)], _TABLES, 1).is_known.any()


def test_molecules_that_lost_their_rings_get_them_back() -> None:
    mol = Chem.RemoveHs(Chem.AddHs(Chem.MolFromSmiles("C1CC1C")), sanitize=False)
    mol.UpdatePropertyCache(strict=False)
    assert arrays_of(mol).atom_features[:, 8].tolist() == [1, 1, 1, 0]
