"""Molecule-like graphs with coordinates, made by NumPy alone: for model benchmarks on machines without RDKit.

Only sizes decide what a training step costs. Atom counts follow those of PCQM4Mv2 (rounded shares of a sample); graphs are
random trees of degree at most 4 with a ring closure for every six atoms, coordinates random walks of 1.5 angstrom along them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES

PCQM_SHARES = {
    8: 2,
    9: 7,
    10: 18,
    11: 32,
    12: 60,
    13: 104,
    14: 170,
    15: 173,
    16: 230,
    17: 181,
    18: 22,
}
"""Atoms without hydrogens -> molecules of 1,000."""


def synthetic_block(num_molecules: int, seed: int = 0) -> MoleculeBlock:
    """``num_molecules`` random molecules, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    sizes, shares = np.array(list(PCQM_SHARES)), np.array(list(PCQM_SHARES.values()), np.float64)
    num_atoms = rng.choice(sizes, num_molecules, p=shares / shares.sum()).astype(np.int32)
    graphs = [_graph(rng, int(n)) for n in num_atoms]
    num_bonds = np.array([len(bonds) for bonds, _ in graphs], np.int32)
    atoms, total_bonds = int(num_atoms.sum()), int(num_bonds.sum())
    return MoleculeBlock(
        molecule_ids=np.arange(num_molecules, dtype=np.int64),
        num_atoms=num_atoms,
        num_bonds=num_bonds,
        atom_features=rng.integers(0, ATOM_VOCAB_SIZES, (atoms, 9)).astype(np.uint8),
        bonds=np.concatenate([bonds for bonds, _ in graphs]),
        bond_features=rng.integers(0, BOND_VOCAB_SIZES, (total_bonds, 3)).astype(np.uint8),
        positions=np.concatenate([positions for _, positions in graphs]),
        position_mask=np.ones(atoms, np.bool_),
        descriptors=undescribed(num_molecules),
    )


def _graph(
    rng: np.random.Generator, num_atoms: int
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """(E, 2) bonds and (n, 3) coordinates of one molecule."""
    degrees = np.zeros(num_atoms, np.int64)
    positions = np.zeros((num_atoms, 3))
    bonds = []
    for atom in range(1, num_atoms):
        open_atoms = np.flatnonzero(degrees[:atom] < 4)
        parent = int(rng.choice(open_atoms[-4:]))
        direction = rng.normal(size=3)
        positions[atom] = positions[parent] + 1.5 * direction / np.linalg.norm(direction)
        bonds.append((parent, atom))
        degrees[[parent, atom]] += 1
    present = set(bonds)
    for _ in range(num_atoms // 6):
        a, b = sorted(int(atom) for atom in rng.integers(0, num_atoms, 2))
        if a != b and (a, b) not in present and max(degrees[a], degrees[b]) < 4:
            present.add((a, b))
            bonds.append((a, b))
            degrees[[a, b]] += 1
    return np.array(bonds, np.uint16).reshape(-1, 2), positions.astype(np.float32)
