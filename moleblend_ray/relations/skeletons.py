"""Hashes of the skeletons of molecules, to tell different molecules apart without comparing them pair by pair.

The skeleton of a fragment is its heavy atoms and which of them are bonded. It is what salts, protonation states,
tautomers and stereoisomers of a molecule have in common, so two fragments of different hashes are forms of different
molecules; of equal hashes, they may be of the same one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moleblend_ray.relations.hashing import keyed_hash, mix
from moleblend_ray.vocabulary import ELEMENT_SYMBOLS

_RADIUS: Final = 3
"""Bonds within which the surroundings of an atom are part of the hash. A smaller one tells fewer molecules apart."""

_HYDROGEN: Final = ELEMENT_SYMBOLS.index("H")
# Bonds to others, such as those to metals or of bridging hydrogens to boron, are drawn in several ways.
_PLAINLY_BONDED: Final = np.isin(
    ELEMENT_SYMBOLS, ["H", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Se", "Br", "I"]
)


class Fragments(NamedTuple):
    """The F fragments of M molecules."""

    molecules: NDArray[np.int64]
    """(F,) int64, index of the molecule, ascending."""
    num_heavy: NDArray[np.int64]
    """(F,) int64, number of atoms but for hydrogens."""
    skeletons: NDArray[np.uint64]
    """(F,) uint64, hash of the skeleton; of a fragment with an element that is bonded in several ways, of its elements."""


def fragments(
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    elements: NDArray[np.uint8],
    bonds: NDArray[np.uint16],
) -> Fragments:
    """The fragments of molecules with ``num_atoms`` (M,) and ``num_bonds`` (M,), A and E in all, by the ``elements`` (A,)
    uint8, codes of the atomic number, and the ``bonds`` (E, 2) uint16, indices within the molecule."""
    first = np.cumsum(num_atoms, dtype=np.int64) - num_atoms
    ends = np.repeat(first, num_bonds)[:, None] + bonds.astype(np.int64)
    bonded = coo_array((np.ones(len(ends), np.bool_), ends.T), shape=(len(elements),) * 2)
    _, labels = connected_components(bonded, directed=False)
    _, roots, fragment_of = np.unique(labels, return_index=True, return_inverse=True)
    is_heavy = elements != _HYDROGEN
    odd = np.zeros(len(roots), dtype=np.bool_)
    odd[fragment_of[~_PLAINLY_BONDED[elements]]] = True
    kept = is_heavy[ends].all(axis=1) & ~odd[fragment_of[ends[:, 0]]]
    atoms = _surroundings(keyed_hash(elements), ends[kept])
    skeletons = np.zeros(len(roots), dtype=np.uint64)
    np.add.at(skeletons, fragment_of[is_heavy], mix(atoms[is_heavy]))
    return Fragments(
        molecules=np.repeat(np.arange(len(num_atoms)), num_atoms)[roots],
        num_heavy=np.bincount(fragment_of[is_heavy], minlength=len(roots)),
        skeletons=skeletons,
    )


def _surroundings(atoms: NDArray[np.uint64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hashes of atoms (A,), each with those within some bonds of it (Weisfeiler and Lehman's refinement)."""
    for radius in range(_RADIUS):
        # A sum does not depend on the order of the neighbours.
        around = np.zeros_like(atoms)
        mixed = mix(atoms)
        np.add.at(around, ends[:, 0], mixed[ends[:, 1]])
        np.add.at(around, ends[:, 1], mixed[ends[:, 0]])
        atoms = keyed_hash(radius, atoms, around)
    return atoms
