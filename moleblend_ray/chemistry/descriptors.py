"""RDKit's two-dimensional descriptors, for baselines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import Descriptors

logger = logging.getLogger(__name__)

DESCRIPTOR_NAMES: Final[tuple[str, ...]] = tuple(name for name, _ in Descriptors.descList)
"""RDKit's own list, in its order; the descriptors on it depend on the RDKit release."""


def descriptors(smiles: Sequence[str]) -> NDArray[np.float64]:
    """(M, D) float64, the D = ``len(DESCRIPTOR_NAMES)`` descriptors of each SMILES, each in its own unit.

    NaN where RDKit cannot compute a descriptor (such as partial charges of metals), and in the whole row of a SMILES
    that it cannot read; the number of these is logged. Some values are infinite: Ipc overflows for large molecules.
    Takes about 6 ms per drug-like molecule.
    """
    values = np.full((len(smiles), len(DESCRIPTOR_NAMES)), np.nan)
    unreadable = 0
    with rdBase.BlockLogs():
        for row, text in enumerate(smiles):
            molecule: Chem.Mol | None = Chem.MolFromSmiles(text)
            if molecule is None:
                unreadable += 1
            else:
                found = Descriptors.CalcMolDescriptors(molecule, np.nan)  # type: ignore[no-untyped-call]
                values[row] = [found[name] for name in DESCRIPTOR_NAMES]
    if unreadable:
        logger.warning("%d of %d SMILES have no descriptors: unreadable", unreadable, len(smiles))
    return values
