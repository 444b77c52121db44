"""Splits leak nothing; labels are checked when they are loaded."""

from __future__ import annotations

import numpy as np
import pytest

from moleblend_ray.chemistry.scaffolds import murcko_scaffold, split_hash
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.dataset import split_molecules
from moleblend_ray.evaluation.tasks import SplitKind

from .conftest import MakeLabelled, all_smiles


@pytest.mark.parametrize("kind", list(SplitKind))
def test_parts_are_disjoint_cover_all_and_repeat_exactly(kind: SplitKind) -> None:
    smiles = all_smiles()
    split = split_molecules(smiles, kind, seed=3)
    assert sorted(np.concatenate(split)) == list(range(len(smiles)))
    assert split_hash(split) == split_hash(split_molecules(smiles, kind, seed=3))


@pytest.mark.parametrize("kind", [SplitKind.SCAFFOLD, SplitKind.SCAFFOLD_BALANCED])
def test_no_scaffold_is_in_two_parts(kind: SplitKind) -> None:
    smiles = all_smiles()
    split = split_molecules(smiles, kind, seed=0)
    scaffolds = [{murcko_scaffold(smiles[index]) for index in part} for part in split]
    assert not scaffolds[0] & scaffolds[1]
    assert not (scaffolds[0] | scaffolds[1]) & scaffolds[2]


def test_copies_of_a_molecule_stay_in_one_part_of_a_random_split() -> None:
    smiles = all_smiles() * 3
    parts = [
        {smiles[index] for index in part} for part in split_molecules(smiles, SplitKind.RANDOM, 0)
    ]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_a_random_split_follows_its_seed_and_not_the_order_of_the_file() -> None:
    smiles = all_smiles()
    shuffled = list(np.random.default_rng(0).permutation(smiles))
    test_parts = [
        {molecules[index] for index in split_molecules(molecules, SplitKind.RANDOM, seed).test}
        for molecules, seed in ((smiles, 0), (shuffled, 0), (smiles, 1))
    ]
    assert test_parts[0] == test_parts[1]
    assert test_parts[0] != test_parts[2]


def test_too_few_molecules_for_three_parts_are_an_error() -> None:
    with pytest.raises(DataError, match="leaves a part empty"):
        split_molecules(["CCO", "CCN"], SplitKind.SCAFFOLD, seed=0)


def test_taken_molecules_keep_labels_names_and_graphs_together(make_labelled: MakeLabelled) -> None:
    smiles = all_smiles()[:20]
    molecules = make_labelled(smiles, np.arange(20.0))
    taken = molecules.take(np.array([7, 3, 11]))
    assert taken.labels[:, 0].tolist() == [7, 3, 11]
    assert taken.mol_ids == ("mol_7", "mol_3", "mol_11")
    assert taken.block.molecule_ids.tolist() == [0, 1, 2]
    assert taken.block.num_atoms.tolist() == [molecules.block.num_atoms[row] for row in (7, 3, 11)]
