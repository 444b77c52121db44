"""The program of the child process that makes conformers; see :func:`conformers.make_conformers`."""

from __future__ import annotations

from rdkit import Chem, rdBase

from moleblend_ray.chemistry.conformers import ConformerRequest, Embedding, embed_conformers
from moleblend_ray.chemistry.killable import serve


def answer(request: ConformerRequest) -> Embedding:
    """The conformers of one molecule, in its own order of atoms."""
    mol = Chem.Mol(request.binary)  # type: ignore[call-overload]  # the type stubs say str
    return embed_conformers(mol, request.canonical_smiles, request.config)


if __name__ == "__main__":
    # RDKit's messages about a molecule are in its detail.
    rdBase.DisableLog("rdApp.*")
    serve(answer)
