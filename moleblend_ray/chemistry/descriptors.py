"""RDKit's two-dimensional descriptors: inputs of baselines, and targets of pretraining."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import Descriptors

from moleblend_ray.chemistry.config import TIMEOUT_S
from moleblend_ray.chemistry.cost import smiles_may_be_slow
from moleblend_ray.chemistry.limited import LimitExceededError, limited
from moleblend_ray.vocabulary import STORED_DESCRIPTORS

logger = logging.getLogger(__name__)

DESCRIPTOR_NAMES: Final[tuple[str, ...]] = tuple(name for name, _ in Descriptors.descList)
"""RDKit's own list, in its order; the descriptors on it depend on the RDKit release."""


def descriptors(smiles: Sequence[str], timeout_s: float = TIMEOUT_S) -> NDArray[np.float64]:
    """(M, D) float64, the D = ``len(DESCRIPTOR_NAMES)`` descriptors of each SMILES, each in its own unit.

    NaN where RDKit cannot compute a descriptor (such as partial charges of metals), and in the whole row of a SMILES
    that it cannot read, or for which it takes longer than ``timeout_s`` (only molecules of many rings); the numbers of
    both are logged. Some values are infinite: Ipc overflows for large molecules.
    Takes about 5 ms per drug-like molecule.
    """
    values = np.full((len(smiles), len(DESCRIPTOR_NAMES)), np.nan)
    unreadable = 0
    exceeded: list[str] = []
    with rdBase.BlockLogs():
        for row, text in enumerate(smiles):
            try:
                found = (
                    limited(descriptors_of_one, text, timeout_s=timeout_s)
                    if smiles_may_be_slow(text)
                    else descriptors_of_one(text)
                )
            except LimitExceededError as error:
                exceeded.append(str(error))
                continue
            if found is None:
                unreadable += 1
            else:
                values[row] = found
    if unreadable:
        logger.warning("%d of %d SMILES have no descriptors: unreadable", unreadable, len(smiles))
    if exceeded:
        logger.warning(
            "%d of %d SMILES have no descriptors: too complex for RDKit (%s)",
            len(exceeded),
            len(smiles),
            ", ".join(sorted(set(exceeded))),
        )
    return values


def descriptors_of_one(smiles: str) -> list[float] | None:
    """The descriptors of one SMILES, however long they take; None if RDKit cannot read it."""
    molecule: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return None
    found = Descriptors.CalcMolDescriptors(molecule, np.nan)  # type: ignore[no-untyped-call]
    return [found[name] for name in DESCRIPTOR_NAMES]


def stored_descriptors(smiles: Sequence[str], timeout_s: float = TIMEOUT_S) -> NDArray[np.float32]:
    """(M, ``vocabulary.NUM_DESCRIPTORS``) float32: those of :func:`descriptors` that shards hold, in their order.

    What does not fit into float32 is NaN, as is what this RDKit does not compute.
    """
    found = descriptors(smiles, timeout_s)
    place = {name: index for index, name in enumerate(DESCRIPTOR_NAMES)}
    known = np.array([name in place for name in STORED_DESCRIPTORS])
    values = np.full((len(smiles), len(STORED_DESCRIPTORS)), np.nan, np.float32)
    # An overflow becomes infinite, and is one of those that are left out.
    with np.errstate(over="ignore"):
        values[:, known] = found[:, [place[name] for name in STORED_DESCRIPTORS if name in place]]
    values[~np.isfinite(values)] = np.nan
    return values
