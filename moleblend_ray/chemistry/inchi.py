"""Standard InChIKeys: two records with the same key are the same molecule.

Keys of parents are coarser: those of two salts or protonation states of a molecule are equal, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from rdkit import Chem, rdBase

from moleblend_ray.chemistry.composition import num_heavy_atoms
from moleblend_ray.chemistry.config import TIMEOUT_S
from moleblend_ray.chemistry.cost import smiles_may_be_slow
from moleblend_ray.chemistry.limited import LimitExceededError, limited

_COUNTERIONS: Final = (
    # Acids, of anions.
    "OS(=O)(=O)c1ccccc1",
    "Cc1ccc(cc1)S(=O)(=O)O",
    "OS(=O)(=O)c1ccc2ccccc2c1",
    "CS(=O)(=O)O",
    "CCS(=O)(=O)O",
    "OS(=O)(=O)CCS(=O)(=O)O",
    "CC1(C)C2CCC1(CS(=O)(=O)O)C(=O)C2",
    "C[C@]1(CS(=O)(=O)O)C(=O)C[C@H]2CC[C@@H]1C2(C)C",
    "OS(=O)(=O)C(F)(F)F",
    "OC(=O)C(F)(F)F",
    "CC(=O)O",
    "OC(=O)C(=O)O",
    "OC(=O)/C=C/C(=O)O",
    "OC(=O)/C=C\\C(=O)O",
    "OC(=O)CCC(=O)O",
    "OC(=O)CC(O)C(=O)O",
    "OC(=O)C[C@H](O)C(=O)O",
    "OC(=O)C(O)C(O)C(=O)O",
    "OC(=O)[C@H](O)[C@@H](O)C(=O)O",
    "OC(=O)[C@@H](O)[C@H](O)C(=O)O",
    "OC(=O)CC(O)(CC(=O)O)C(=O)O",
    "OC(=O)c1ccccc1",
    "OC(=O)c1ccccc1O",
    "OC(=O)c1cc2ccccc2c(Cc2c(O)c(C(=O)O)cc3ccccc23)c1O",
    "OS(=O)(=O)O",
    "OP(=O)(O)O",
    "O[N+](=O)[O-]",
    "OC(=O)O",
    "OCl(=O)(=O)=O",
    "F[P-](F)(F)(F)(F)F",
    "F[B-](F)(F)F",
    # Bases, of cations.
    "CNC[C@H](O)[C@@H](O)[C@H](O)[C@H](O)CO",
    "NC(CO)(CO)CO",
    "NCCCC[C@H](N)C(=O)O",
    "CCN(CC)CC",
    "C1CCC(CC1)NC1CCCCC1",
)
"""Counterions of drugs in neutral form that may be larger than what they are a counterion of."""


def inchi_keys(smiles: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str | None]:
    """The standard InChIKey (27 characters) of each SMILES, None where there is none.

    There is no key for molecules with unknown atoms (dummies) or with more than 1,024 atoms. The standard InChI does
    not distinguish tautomers that differ in mobile hydrogens, and disconnects bonds to metals. Nor is there one if RDKit
    takes longer than ``timeout_s`` for a molecule of many rings.
    """
    with rdBase.BlockLogs():
        return [_limited_key(text, timeout_s) for text in smiles]


def parent_keys(smiles: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str]:
    """(M,) texts that are equal for the forms of one molecule: its salts, protonation states and tautomers that differ in
    mobile hydrogens.

    That is the InChIKey, without its protonation, of the largest fragment that is no usual counterion and has several
    atoms, or else of the largest; where there is no key, that fragment itself. Stereoisomers, a molecule with open stereo
    beside them, isotopologues, and tautomers that differ in hydrogens on carbon (keto and enol) have keys of their own.
    """
    fragments = [sorted(text.split("."), key=_size_of, reverse=True) for text in smiles]
    different = list(dict.fromkeys(fragment for parts in fragments for fragment in parts))
    keys = {
        fragment: _without_protonation(key) if key else fragment
        for fragment, key in zip(different, inchi_keys(different, timeout_s), strict=True)
    }
    return [
        next(
            (
                keys[fragment]
                for fragment in parts
                if num_heavy_atoms(fragment) > 1 and keys[fragment] not in _counterion_keys()
            ),
            keys[parts[0]],
        )
        for parts in fragments
    ]


@lru_cache(maxsize=1)
def _counterion_keys() -> frozenset[str]:
    return frozenset(_without_protonation(key) for key in inchi_keys(_COUNTERIONS) if key)


def _without_protonation(key: str) -> str:
    """A key without its last part, which tells how many protons were added or removed."""
    return key.rpartition("-")[0]


def _size_of(fragment: str) -> tuple[int, str]:
    # Of fragments of one size the same one, whatever the others are.
    return num_heavy_atoms(fragment), fragment


def _limited_key(smiles: str, timeout_s: float) -> str | None:
    if not smiles_may_be_slow(smiles):
        return inchi_key(smiles)
    try:
        key: str | None = limited(inchi_key, smiles, timeout_s=timeout_s)
    except LimitExceededError:
        return None
    return key


def inchi_key(smiles: str) -> str | None:
    """The key of one SMILES, however long it takes."""
    try:
        mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
        if mol is None:
            return None
        key: str = Chem.MolToInchiKey(mol)  # type: ignore[no-untyped-call]
        return key or None
    # RDKit raises various classes; one odd molecule of a hundred million must not end a job.
    except Exception:
        return None
