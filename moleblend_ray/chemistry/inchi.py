"""Standard InChIKeys: two records with the same key are the same molecule."""

from __future__ import annotations

from collections.abc import Sequence

from rdkit import Chem, rdBase


def inchi_keys(smiles: Sequence[str]) -> list[str | None]:
    """The standard InChIKey (27 characters) of each SMILES, None where there is none.

    There is no key for molecules with unknown atoms (dummies) or with more than 1,024 atoms. The standard InChI does
    not distinguish tautomers that differ in mobile hydrogens, and disconnects bonds to metals.
    """
    with rdBase.BlockLogs():
        return [_inchi_key(text) for text in smiles]


def _inchi_key(smiles: str) -> str | None:
    try:
        mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
        if mol is None:
            return None
        key: str = Chem.MolToInchiKey(mol)  # type: ignore[no-untyped-call]
        return key or None
    # RDKit raises various classes; one odd molecule of a hundred million must not end a job.
    except Exception:
        return None
