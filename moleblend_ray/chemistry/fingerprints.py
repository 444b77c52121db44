"""Extended-connectivity fingerprints, for baselines and similarity."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdFingerprintGenerator

logger = logging.getLogger(__name__)


def ecfp(smiles: Sequence[str], *, radius: int = 2, num_bits: int = 2048) -> NDArray[np.uint8]:
    """(M, num_bits) of 0 and 1, the Morgan fingerprint of each SMILES; radius 2 is ECFP4.

    A SMILES that RDKit cannot read has no bits; the number of these is logged.
    """
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=num_bits)
    fingerprints = np.zeros((len(smiles), num_bits), dtype=np.uint8)
    unreadable = 0
    with rdBase.BlockLogs():
        for row, text in enumerate(smiles):
            molecule = _parse(text)
            if molecule is None:
                unreadable += 1
            else:
                fingerprints[row] = generator.GetFingerprintAsNumPy(molecule)
    if unreadable:
        logger.warning("%d of %d SMILES have no fingerprint: unreadable", unreadable, len(smiles))
    return fingerprints


def _parse(smiles: str) -> Chem.Mol | None:
    molecule: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    return molecule
