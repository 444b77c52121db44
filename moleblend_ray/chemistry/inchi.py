"""Standard InChIKeys: the identity by which two records are the same molecule."""

from __future__ import annotations

from collections.abc import Sequence

from rdkit import Chem, rdBase


def inchi_keys(smiles: Sequence[str]) -> list[str | None]:
    """The standard InChIKey of each SMILES (27 characters), None where there is none.

    InChI makes no key of molecules with atoms that it does not know (dummies) or with more than 1,024 atoms. The
    standard InChI does not tell tautomers of mobile hydrogens apart, and cuts bonds to metals.
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
    # One odd molecule of a hundred million, whatever class RDKit raises for it, must not end a job.
    except Exception:
        return None
