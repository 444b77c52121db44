from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import molecule_zoo as zoo
import numpy as np
import pytest
import torch

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.environments import CHIRALITY_COLUMN, environment_counts

BINS = 4096
"""So many that no two environments of these tests share a bin."""


def counts(molecules: Sequence[zoo.ZooMolecule], bins: int = BINS) -> torch.Tensor:
    return environment_counts(zoo.batch(molecules), bins)


def plain(molecule: zoo.ZooMolecule) -> zoo.ZooMolecule:
    """The same graph with equal atoms and equal bonds."""
    return dataclasses.replace(
        molecule,
        atom_features=np.zeros_like(molecule.atom_features),
        bond_features=np.zeros_like(molecule.bond_features),
    )


def multiplicities(row: torch.Tensor) -> list[int]:
    return sorted(int(value) for value in row[row > 0])


def named_environments(batch: MoleculeBatch, row: int) -> Counter[str]:
    """Environments written out as nested text, which is different for different ones."""
    n = int(batch.num_atoms[row])
    codes = np.delete(batch.atom_features[row, :n].numpy(), CHIRALITY_COLUMN, axis=1)
    bonds = batch.path_codes[row, :n, :n, 0].numpy()
    neighbours = [np.flatnonzero(batch.spd[row, atom, :n].numpy() == 1) for atom in range(n)]
    names = [str(atom.tolist()) for atom in codes]
    found = Counter(f"0 {name}" for name in names)
    for radius in (1, 2):
        names = [
            f"{names[a]}({'|'.join(sorted(f'{bonds[a, b]}{names[b]}' for b in neighbours[a]))})"
            for a in range(n)
        ]
        found.update(f"{radius} {name}" for name in names)
    return found


def test_environments_are_told_apart_as_written_out() -> None:
    equal = [plain(zoo.ring(6)), plain(zoo.chain(7)), plain(zoo.ring(5, tail=3)), plain(zoo.cage())]
    molecules = [*equal, zoo.chain(7), zoo.chain(7, seed=3), zoo.ring(6, tail=4), zoo.salt()]
    batch = zoo.batch(molecules)
    found = environment_counts(batch, 1 << 20)
    written = [named_environments(batch, row) for row in range(len(molecules))]
    assert sum((written[0] & written[1]).values()) > 0
    for row, names in enumerate(written):
        assert multiplicities(found[row]) == sorted(names.values())
        for other in range(row):
            shared = sum((names & written[other]).values())
            assert torch.minimum(found[row], found[other]).sum() == shared


def test_every_atom_is_the_centre_of_one_environment_of_each_radius() -> None:
    found = counts([zoo.chain(1), zoo.chain(4), zoo.ring(6)], bins=16)
    assert found.sum(1).tolist() == [3.0, 12.0, 18.0]


def test_a_ring_of_equal_atoms_has_one_environment_a_radius() -> None:
    assert multiplicities(counts([plain(zoo.ring(6))])[0]) == [6, 6, 6]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_numbering_of_the_atoms_changes_nothing(seed: int) -> None:
    molecule = zoo.chain(9, seed=seed)
    order = np.random.default_rng(seed).permutation(9)
    assert torch.equal(*counts([molecule, molecule.permuted(order)]))


def test_chirality_codes_which_depend_on_the_numbering_change_nothing() -> None:
    molecule = zoo.chain(9)
    codes = molecule.atom_features.copy()
    codes[:, CHIRALITY_COLUMN] = (codes[:, CHIRALITY_COLUMN] + 1) % 4
    assert torch.equal(*counts([molecule, dataclasses.replace(molecule, atom_features=codes)]))


def test_padding_and_other_molecules_change_nothing() -> None:
    small = zoo.chain(3)
    assert torch.equal(counts([small])[0], counts([small, zoo.ring(12)])[0])


def test_coordinates_do_not_matter() -> None:
    molecule = zoo.chain(5)
    assert torch.equal(*counts([molecule, molecule.without_positions()]))


def test_folding_adds_bins_up() -> None:
    wide = counts([zoo.chain(9, seed=1)], bins=64)
    narrow = counts([zoo.chain(9, seed=1)], bins=16)
    assert torch.equal(wide.view(1, 4, 16).sum(1), narrow)
