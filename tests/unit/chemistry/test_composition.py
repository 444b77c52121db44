"""Formulas from text agree with RDKit's."""

from __future__ import annotations

from collections import Counter

import pytest
from rdkit import Chem

from moleblend_ray.chemistry.composition import formula_of_molblock, formula_of_smiles
from moleblend_ray.chemistry.samples import make_samples

ODD = [
    "[2H]C([2H])Cl",
    "c1c[nH]cc1",
    "C[Si](C)(C)C",
    "c1cc[se]c1",
    "[Na+].[Cl-]",
    "BrC%12CCCC%12",
    "N[C@@H](C)C(=O)O",
    "[13CH4]",
    "[O-][N+](=O)c1ccccc1",
    "FC(F)(F)S(=O)(=O)[N-]P",
    "OB(O)c1ccccc1I",
    "[H][H]",
    "[Fe]",
]


def expected(mol: Chem.Mol) -> str:
    counts = Counter(atom.GetSymbol() for atom in mol.GetAtoms() if atom.GetAtomicNum() != 1)
    return " ".join(f"{symbol}{counts[symbol]}" for symbol in sorted(counts))


def all_smiles() -> list[str]:
    return ODD + [sample.smiles for sample in make_samples(20, num_processes=1)]


def test_the_formula_of_a_smiles_is_rdkit_s() -> None:
    for smiles in all_smiles():
        assert formula_of_smiles(smiles) == expected(Chem.MolFromSmiles(smiles)), smiles
    assert formula_of_smiles("CCO |$;;R1$| ethanol NN") == "C2 O1"
    assert formula_of_smiles(" ") == ""


@pytest.mark.parametrize("v3000", [False, True])
def test_the_formula_of_a_molblock_is_rdkit_s(v3000: bool) -> None:
    for smiles in all_smiles():
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        block = Chem.MolToMolBlock(mol, forceV3000=v3000)
        assert formula_of_molblock(block) == expected(mol), smiles


@pytest.mark.parametrize("block", ["", "a\nb", "a\nb\nc\n x\n"])
def test_a_malformed_block_has_no_formula(block: str) -> None:
    assert formula_of_molblock(block) is None
