"""No record that may be slow is taken for a quick one, and hardly an ordinary one for a slow one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from many_rings import C60, cyclodextrin, cycloparaphenylene
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.cost import FEW_RINGS, may_be_slow, smiles_may_be_slow
from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText, SourceRecord

TRIANGLES = ".".join(["C1CC1"] * FEW_RINGS)
"""As many rings as are quick, and more bonds than are quick in any case."""
TOO_MANY_TRIANGLES = TRIANGLES + ".C1CC1"


def drawn(smiles: str, seed: int | None = None) -> Chem.Mol:
    """The molecule as it is written, its atoms in random order if there is a seed."""
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    mol.UpdatePropertyCache(strict=False)
    if seed is None:
        return mol
    order = list(range(mol.GetNumAtoms()))
    random.Random(seed).shuffle(order)
    return Chem.RenumberAtoms(mol, order)


def block_of(mol: Chem.Mol, *, v3000: bool) -> str:
    return Chem.MolToMolBlock(mol, kekulize=False, forceV3000=v3000)


def row_of(mol: Chem.Mol) -> GeometryRow:
    return GeometryRow(
        atomic_numbers=np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8),
        formal_charges=np.zeros(mol.GetNumAtoms(), np.int8),
        positions=np.zeros(3 * mol.GetNumAtoms()),
        bond_begin=[bond.GetBeginAtomIdx() for bond in mol.GetBonds()],
        bond_end=np.array([bond.GetEndAtomIdx() for bond in mol.GetBonds()], np.int32),
        bond_order=[1] * mol.GetNumBonds(),
    )


def all_forms(smiles: str, seed: int | None = None) -> list[SourceRecord]:
    mol = drawn(smiles, seed)
    blocks = [block_of(mol, v3000=v3000) for v3000 in (False, True)]
    with_returns = [block.replace("\n", "\r\n") for block in blocks]
    named = ["Fullerène 😀" + blocks[0], blocks[0] + "> <name>\nFullerène\n"]
    texts = [Chem.MolToSmiles(mol, canonical=False)]
    return [*map(SmilesText, texts), *map(MolBlock, blocks + with_returns + named), row_of(mol)]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_number_of_independent_rings_decides_in_every_form(seed: int | None) -> None:
    assert [may_be_slow(record) for record in all_forms(TRIANGLES, seed)] == [False] * 8
    assert [may_be_slow(record) for record in all_forms(TOO_MANY_TRIANGLES, seed)] == [True] * 8


@pytest.mark.parametrize("smiles", [C60, cyclodextrin(9), cycloparaphenylene(9)])
@pytest.mark.parametrize("fragments", [0, 40])
def test_fragments_beside_them_do_not_hide_rings(smiles: str, fragments: int) -> None:
    record = ".".join([smiles, *["O"] * fragments])
    assert all(may_be_slow(found) for found in all_forms(record, seed=2))


@pytest.mark.parametrize(
    "smiles",
    [
        "CC(C)Cc1ccc(C(C)C(=O)O)cc1",
        "[2H]C([2H])([2H])[13CH2][C@@H](N)C(=O)[O-].[Na+]",
        "CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5",
        "C" * 150,
        cyclodextrin(7),
    ],
)
def test_ordinary_molecules_are_quick(smiles: str) -> None:
    with_hydrogens = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert not smiles_may_be_slow(smiles)
    for v3000 in (False, True):
        assert not may_be_slow(MolBlock(block_of(with_hydrogens, v3000=v3000)))
    assert not may_be_slow(row_of(with_hydrogens))


@pytest.mark.parametrize(
    "record",
    [
        SmilesText("C" * 600),
        SmilesText("C(" * 5000),
        SmilesText("é" * 600 + "\ud800"),
        *all_forms("C" * 600),
        # Numbers that are none, or those of atoms that do not exist.
        MolBlock("\n\n\n 30 40  0  0  0  0  0  0  0  0999 V2000\n"),
        MolBlock("\n\n\n3x 40  0\n"),
        MolBlock("\n\n\n  0  0  0     0  0            999 V3000\nM  V30 COUNTS x\n"),
        MolBlock("\n\n\n  0  0  0     0  0            999 V3000\nM  V30 COUNTS " + "9" * 5000),
        MolBlock("\n\n\n  0  0  0     0  0            999 V3000\nM  V30 COUNTS 30 30 0 0 0\n"),
        MolBlock(block_of(drawn(TRIANGLES), v3000=False).replace("  1  2", " 99  2", 1)),
        MolBlock(block_of(drawn(TRIANGLES), v3000=False).replace("  1  2", "  a  2", 1)),
        MolBlock(block_of(drawn(TRIANGLES), v3000=True).replace(" 1 1 1 2", " 1 1 1 77", 1)),
        MolBlock(block_of(drawn(TRIANGLES), v3000=True).replace(" 1 1 1 2", " 1 1 1 2 -", 1)),
        row_of(drawn(TRIANGLES))._replace(bond_begin=[40] * 27),
        row_of(drawn(TRIANGLES))._replace(bond_begin=[0] * 28),
        row_of(drawn(TRIANGLES))._replace(bond_begin=["a"] * 27),  # type: ignore[list-item]
    ],
)
def test_what_is_large_or_cannot_be_told_may_be_slow(record: SourceRecord) -> None:
    assert may_be_slow(record)


@pytest.mark.parametrize("value", [None, 7, b"C1CC1", float("nan"), "", "\n"])
def test_what_is_no_record_is_no_error(value: Any) -> None:
    assert not may_be_slow(SmilesText(value))
    assert not may_be_slow(MolBlock(value))
    may_be_slow(GeometryRow(*[value] * 6))


@settings(max_examples=200)
@given(st.integers(20, 60), st.integers(25, 70), st.integers(0, 1 << 32))
def test_a_molblock_or_row_is_slow_exactly_if_it_has_too_many_rings(
    num_atoms: int, num_bonds: int, seed: int
) -> None:
    source = random.Random(seed)
    mol = Chem.RWMol()
    for _ in range(num_atoms):
        mol.AddAtom(Chem.Atom("Fe"))
    while mol.GetNumBonds() < num_bonds:
        begin, end = source.sample(range(num_atoms), 2)
        if mol.GetBondBetweenAtoms(begin, end) is None:
            mol.AddBond(begin, end, Chem.BondType.SINGLE)
    mol.UpdatePropertyCache(strict=False)
    num_rings = num_bonds - num_atoms + len(Chem.GetMolFrags(mol))
    records: list[SourceRecord] = [
        *(MolBlock(block_of(mol, v3000=v3000)) for v3000 in (False, True)),
        row_of(mol),
    ]
    for record in records:
        assert may_be_slow(record) == (num_rings > FEW_RINGS)


@settings(max_examples=300)
@given(st.text(alphabet="CNO[]()=123456789%0@H+.-", max_size=60))
def test_no_quick_smiles_has_many_rings(text: str) -> None:
    with rdBase.BlockLogs():
        mol: Chem.Mol | None = Chem.MolFromSmiles(text, sanitize=False)
    if mol is not None and not smiles_may_be_slow(text):
        assert mol.GetNumBonds() - mol.GetNumAtoms() + len(Chem.GetMolFrags(mol)) <= FEW_RINGS


@settings(max_examples=300)
@given(st.integers(0, 2000), st.text(max_size=20), st.integers(0, 5), st.booleans())
def test_no_damaged_molblock_raises(start: int, text: str, removed: int, v3000: bool) -> None:
    block = block_of(drawn(TRIANGLES), v3000=v3000)
    may_be_slow(MolBlock(block[:start] + text + block[start + removed :]))
