"""What a source says of one molecule, as the featurizer takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class GeometryRow(NamedTuple):
    """One row of a table of molecules with geometry. Hydrogens may be listed or left implicit."""

    atomic_numbers: Sequence[int] | NDArray[np.integer]
    """(N,)"""
    formal_charges: Sequence[int] | NDArray[np.integer]
    """(N,)"""
    positions: Sequence[float] | NDArray[np.floating] | None
    """(3 N,) or (N, 3), angstrom; no coordinates if None, or if all are zero and there are several atoms."""
    bond_begin: Sequence[int] | NDArray[np.integer]
    """(E,): atom indices counted from 0."""
    bond_end: Sequence[int] | NDArray[np.integer]
    """(E,)"""
    bond_order: Sequence[int] | NDArray[np.integer]
    """(E,): Kekule order 1, 2 or 3."""
    smiles: str | None = None
    """Used instead of the lists if there are no coordinates, because it can state stereo and they cannot."""


class SmilesText(NamedTuple):
    """A record that is a SMILES."""

    smiles: str | None


class MolBlock(NamedTuple):
    """A record that is a V2000 or V3000 block; what follows ``M  END`` is ignored."""

    block: str | None


SourceRecord = SmilesText | MolBlock | GeometryRow
