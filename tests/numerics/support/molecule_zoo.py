"""Molecules made by hand for tests: graphs and coordinates without any chemistry library."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES


@dataclass(frozen=True, kw_only=True)
class ZooMolecule:
    """One molecule as small arrays."""

    atom_features: NDArray[np.uint8]
    bonds: NDArray[np.uint16]
    bond_features: NDArray[np.uint8]
    positions: NDArray[np.float32]
    position_mask: NDArray[np.bool_]

    @property
    def num_atoms(self) -> int:
        return len(self.atom_features)

    def without_positions(self, atoms: Any = slice(None)) -> ZooMolecule:
        """The same, with unknown coordinates of some ``atoms``, stored as NaN so that any use of them shows."""
        mask, positions = self.position_mask.copy(), self.positions.copy()
        mask[atoms], positions[atoms] = False, np.nan
        return dataclasses.replace(self, position_mask=mask, positions=positions)

    def moved(self, positions: NDArray[np.floating]) -> ZooMolecule:
        return dataclasses.replace(self, positions=positions.astype(np.float32))

    def permuted(self, order: NDArray[np.int64]) -> ZooMolecule:
        """New atom k is old atom ``order[k]``."""
        place = np.argsort(order)
        return ZooMolecule(
            atom_features=self.atom_features[order],
            bonds=place[self.bonds.astype(np.int64)].astype(np.uint16).reshape(-1, 2),
            bond_features=self.bond_features,
            positions=self.positions[order],
            position_mask=self.position_mask[order],
        )


def molecule(num_atoms: int, bonds: Sequence[tuple[int, int]], seed: int = 0) -> ZooMolecule:
    """A molecule with the given graph; features and coordinates drawn from ``seed``."""
    rng = np.random.default_rng((seed, num_atoms, len(bonds)))
    types = [rng.integers(0, size, num_atoms) for size in ATOM_VOCAB_SIZES]
    bond_types = [rng.integers(0, size, len(bonds)) for size in (4, 3, 2)]
    return ZooMolecule(
        atom_features=np.stack(types, 1).astype(np.uint8),
        bonds=np.array(bonds, np.uint16).reshape(-1, 2),
        bond_features=np.stack(bond_types, 1).astype(np.uint8).reshape(-1, 3),
        positions=rng.normal(0.0, 2.0, (num_atoms, 3)).astype(np.float32),
        position_mask=np.ones(num_atoms, bool),
    )


def chain(num_atoms: int, seed: int = 0) -> ZooMolecule:
    return molecule(num_atoms, [(i, i + 1) for i in range(num_atoms - 1)], seed)


def ring(num_atoms: int, tail: int = 0, seed: int = 0) -> ZooMolecule:
    """A ring with a chain of ``tail`` atoms on atom 0; even rings have equally short paths."""
    bonds = [(i, (i + 1) % num_atoms) for i in range(num_atoms)]
    previous = 0
    for atom in range(num_atoms, num_atoms + tail):
        bonds.append((previous, atom))
        previous = atom
    return molecule(num_atoms + tail, bonds, seed)


def salt(seed: int = 0) -> ZooMolecule:
    """Two fragments: a ring with a tail, and one lone atom."""
    ring_part = ring(5, tail=2, seed=seed)
    bonds = [(int(a), int(b)) for a, b in ring_part.bonds]
    return molecule(8, bonds, seed)


def cage(seed: int = 0) -> ZooMolecule:
    """Cubane's graph: many equally short paths."""
    bonds = [(a, a ^ bit) for a in range(8) for bit in (1, 2, 4) if a < a ^ bit]
    return molecule(8, bonds, seed)


def single_atom(seed: int = 0) -> ZooMolecule:
    return molecule(1, [], seed)


def block(molecules: Sequence[ZooMolecule], ids: Sequence[int] | None = None) -> MoleculeBlock:
    def joined(name: str) -> Any:
        return np.concatenate([getattr(one, name) for one in molecules])

    return MoleculeBlock(
        molecule_ids=np.array(ids if ids is not None else range(len(molecules)), np.int64),
        num_atoms=np.array([one.num_atoms for one in molecules], np.int32),
        num_bonds=np.array([len(one.bonds) for one in molecules], np.int32),
        atom_features=joined("atom_features"),
        bonds=joined("bonds"),
        bond_features=joined("bond_features"),
        positions=joined("positions"),
        position_mask=joined("position_mask"),
        descriptors=undescribed(len(molecules)),
    )


def batch(
    molecules: Sequence[ZooMolecule],
    ids: Sequence[int] | None = None,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> MoleculeBatch:
    """One batch through the data pipeline, which sorts molecules by size (stably)."""
    (micro,) = build_micro_batches(block(molecules, ids), step, 0, len(molecules))
    return MoleculeBatch.from_micro_batch(micro, device)


def in_double(one: MoleculeBatch) -> MoleculeBatch:
    return dataclasses.replace(one, positions=one.positions.double())


def drug_like(count: int, seed: int = 0) -> list[ZooMolecule]:
    """``count`` different rings with tails, 4 to 16 atoms."""
    rng = np.random.default_rng(seed)
    return [
        ring(int(rng.integers(3, 8)), tail=int(rng.integers(1, 10)), seed=seed * 1000 + k)
        for k in range(count)
    ]


def rotation(seed: int = 0) -> NDArray[np.float64]:
    """A random proper rotation matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q[:, ::-1]


def spread_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Replace the initial weights by values of order 1 / sqrt(inputs), so that every term has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.1 * noise)
            elif name.endswith(("gaussian.means", "gaussian.widths")):
                weight.copy_(0.5 + 2.0 * noise.abs())
            elif weight.dim() >= 2 and "geometry.gaussian" not in name:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.5 + 0.2 * noise)
