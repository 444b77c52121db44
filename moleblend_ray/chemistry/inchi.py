"""Standard InChIKeys: two records with the same key are the same molecule."""

from __future__ import annotations

from collections.abc import Sequence

from rdkit import Chem, rdBase

from moleblend_ray.chemistry.config import TIMEOUT_S
from moleblend_ray.chemistry.cost import smiles_may_be_slow
from moleblend_ray.chemistry.limited import LimitExceededError, limited


def inchi_keys(smiles: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str | None]:
    """The standard InChIKey (27 characters) of each SMILES, None where there is none.

    There is no key for molecules with unknown atoms (dummies) or with more than 1,024 atoms. The standard InChI does
    not distinguish tautomers that differ in mobile hydrogens, and disconnects bonds to metals. Nor is there one if RDKit
    takes longer than ``timeout_s`` for a molecule of many rings.
    """
    with rdBase.BlockLogs():
        return [_limited_key(text, timeout_s) for text in smiles]


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
