"""Labelled molecules that are taken together keep what belongs to each."""

from __future__ import annotations

import numpy as np

from moleblend_ray.evaluation.molecules.dataset import only_used
from moleblend_ray.evaluation.splits.split import split_molecules, with_fewer_labels
from moleblend_ray.evaluation.tasks import SplitKind

from ..conftest import MakeLabelled, all_smiles


def test_taken_molecules_keep_labels_names_and_graphs_together(make_labelled: MakeLabelled) -> None:
    smiles = all_smiles()[:20]
    molecules = make_labelled(smiles, np.arange(20.0))
    taken = molecules.take(np.array([7, 3, 11]))
    assert taken.labels[:, 0].tolist() == [7, 3, 11]
    assert taken.mol_ids == ("mol_7", "mol_3", "mol_11")
    assert taken.block.molecule_ids.tolist() == [0, 1, 2]
    assert taken.block.num_atoms.tolist() == [molecules.block.num_atoms[row] for row in (7, 3, 11)]


def test_only_the_molecules_of_a_part_are_kept_with_their_labels(
    make_labelled: MakeLabelled,
) -> None:
    smiles = all_smiles()
    molecules = make_labelled(smiles, np.arange(float(len(smiles))))
    whole = split_molecules(molecules.smiles, SplitKind.RANDOM, 0)
    few = with_fewer_labels(whole, molecules.smiles, 0, train=10, valid=4)
    kept, split = only_used(molecules, few)
    assert len(kept) == sum(map(len, few))
    for before, after in zip(few, split, strict=True):
        assert kept.labels[after, 0].tolist() == before.tolist()
        assert [kept.smiles[row] for row in after] == [molecules.smiles[row] for row in before]
    assert only_used(molecules, whole) == (molecules, whole)
