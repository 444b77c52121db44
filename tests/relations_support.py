"""For tests of relations: the atoms at which the kernel splits paths, and degrees counted by NumPy."""

from __future__ import annotations

import numpy as np

from moleblend_ray.relations.topology import relate_molecule, workspace
from moleblend_ray.vocabulary import UNREACHABLE

BONDED = -1
"""Intermediate atom of bonded pairs, and of an atom with itself: there is none."""

DISCONNECTED = -2
"""Intermediate atom of pairs in different fragments."""


def intermediate_atoms(
    num_atoms: np.ndarray, num_bonds: np.ndarray, bonds: np.ndarray
) -> np.ndarray:
    """(P,) the atom at which Floyd-Warshall splits the path of each ordered pair; else ``BONDED`` or ``DISCONNECTED``.

    Read from the scratch of the production kernel, molecule by molecule.
    """
    space = workspace(num_atoms, num_bonds)
    found = []
    bond = 0
    for n, count in zip(num_atoms.tolist(), num_bonds.tolist(), strict=True):
        spd, words = np.empty(n * n, np.uint8), np.empty(n * n, np.uint32)
        own = bonds[bond : bond + count]
        assert relate_molecule(n, own, np.zeros((count, 3), np.uint8), spd, words, space)
        split = space.middle[:n, :n].ravel() - 1
        found.append(np.where(spd == UNREACHABLE, DISCONNECTED, split))
        bond += count
    return np.concatenate(found)


def bond_degrees(num_atoms: np.ndarray, num_bonds: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """(A,) uint8, the number of neighbours of each atom, at most 255."""
    starts = np.cumsum(num_atoms, dtype=np.int64) - num_atoms
    ends = bonds.astype(np.int64) + np.repeat(starts, num_bonds)[:, None]
    counts = np.bincount(ends.ravel(), minlength=int(num_atoms.sum()))
    return np.minimum(counts, 255).astype(np.uint8)
