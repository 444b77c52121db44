"""Splits leak nothing; labels are checked when they are loaded."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles
from moleblend_ray.chemistry.samples import make_samples
from moleblend_ray.chemistry.scaffolds import murcko_scaffold, split_hash
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.splits.split import split_molecules, with_fewer_labels
from moleblend_ray.evaluation.tasks import SplitKind

from ..conftest import all_smiles

COMPUTED = [kind for kind in SplitKind if not kind.is_of_data]


@pytest.mark.parametrize("kind", COMPUTED)
def test_parts_are_disjoint_cover_all_and_repeat_exactly(kind: SplitKind) -> None:
    smiles = all_smiles()
    groups = np.arange(len(smiles)) // 2
    split = split_molecules(smiles, kind, seed=3, groups=groups)
    assert sorted(np.concatenate(split)) == list(range(len(smiles)))
    assert split_hash(split) == split_hash(split_molecules(smiles, kind, seed=3, groups=groups))


@pytest.mark.parametrize("kind", [SplitKind.SCAFFOLD, SplitKind.SCAFFOLD_BALANCED])
def test_no_scaffold_is_in_two_parts(kind: SplitKind) -> None:
    smiles = all_smiles()
    split = split_molecules(smiles, kind, seed=0)
    scaffolds = [{murcko_scaffold(smiles[index]) for index in part} for part in split]
    assert not scaffolds[0] & scaffolds[1]
    assert not (scaffolds[0] | scaffolds[1]) & scaffolds[2]


@pytest.mark.shared_data
@pytest.mark.parametrize("kind", [SplitKind.SCAFFOLD, SplitKind.SCAFFOLD_BALANCED])
@pytest.mark.parametrize("name", ["clintox", "esol"])
def test_no_scaffold_of_a_real_file_is_in_two_parts(
    name: str, kind: SplitKind, shared_data: Path
) -> None:
    with gzip.open(shared_data / f"moleculenet/{name}.csv.gz", "rt") as file:
        texts = [row["smiles"] for row in csv.DictReader(file)][:600]
    found = [molecule_from_smiles(text, FeaturizeConfig()) for text in texts]
    smiles = [molecule.smiles for molecule in found if isinstance(molecule, Molecule)]
    split = split_molecules(smiles, kind, seed=1)
    scaffolds = [{murcko_scaffold(smiles[index]) for index in part} for part in split]
    assert not scaffolds[0] & scaffolds[1]
    assert not (scaffolds[0] | scaffolds[1]) & scaffolds[2]


def test_no_scaffold_of_the_samples_is_in_two_parts() -> None:
    smiles = [sample.smiles for sample in make_samples(50, num_processes=1)]
    for kind in (SplitKind.SCAFFOLD, SplitKind.SCAFFOLD_BALANCED):
        split = split_molecules(smiles, kind, seed=1)
        scaffolds = [{murcko_scaffold(smiles[index]) for index in part} for part in split]
        assert not scaffolds[0] & scaffolds[1]
        assert not (scaffolds[0] | scaffolds[1]) & scaffolds[2]


def test_a_given_split_is_taken_as_it_is_and_its_copies_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    smiles = ["CC", "CN", "CO", "CF", "CC"]
    parts = np.array([0, 1, 2, 0, 2], dtype=np.uint8)
    split = split_molecules(smiles, SplitKind.GIVEN, 0, parts)
    assert [part.tolist() for part in split] == [[0, 3], [1], [2, 4]]
    assert "1 molecules are in two parts" in caplog.text


def test_molecules_of_too_few_times_are_told() -> None:
    parts = np.array([0, 2, 2], np.uint8)
    with pytest.raises(DataError, match=r"the time split .*'valid': 0.*the newest fifth"):
        split_molecules(["CC", "CN", "CO"], SplitKind.TIME, 0, parts)


def test_no_group_is_in_two_parts_whose_sizes_are_the_usual_ones_and_the_seed_says_which() -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 9 + 1))
    smiles = ["C" * (row + 1) for row in range(len(groups))]
    splits = [
        split_molecules(smiles, SplitKind.GROUP, seed, groups=groups) for seed in (0, 0, 1, 2)
    ]
    for split in splits:
        found = [set(groups[part]) for part in split]
        assert len(set.union(*found)) == sum(map(len, found)) == 60
        shares = np.array([len(part) for part in split]) / len(smiles)
        np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    assert len({split_hash(split) for split in splits}) == 3


def test_groups_too_large_for_testing_are_for_training() -> None:
    groups = np.concatenate([np.zeros(60, int), np.arange(40) // 2 + 1])
    smiles = ["C" * (row + 1) for row in range(100)]
    for seed in range(5):
        assert 0 in groups[split_molecules(smiles, SplitKind.GROUP, seed, groups=groups).train]


def test_few_groups_are_told_what_else_there_is() -> None:
    groups = np.repeat(np.arange(4), 5)
    with pytest.raises(DataError, match=r"20 molecules in 4 groups leaves a part .*task\.folds"):
        split_molecules(["C"] * 20, SplitKind.GROUP, 0, groups=groups)
    with pytest.raises(ConfigError, match=r"split=group: expected a column of groups"):
        split_molecules(["C"] * 20, SplitKind.GROUP, 0)


def test_copies_in_groups_of_different_parts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    groups, smiles = np.arange(20), ["C" * (row + 1) for row in range(20)]
    split = split_molecules(smiles, SplitKind.GROUP, 0, groups=groups)
    assert not caplog.text
    smiles[split.test[0]] = smiles[split.train[0]]
    split_molecules(smiles, SplitKind.GROUP, 0, groups=groups)
    assert "1 molecules are in two parts of the group split" in caplog.text


@pytest.mark.parametrize("parts", [None, np.zeros(3, np.uint8), np.array([0, 1, 0], np.uint8)])
def test_a_given_split_without_one_of_the_parts_is_an_error(parts: np.ndarray | None) -> None:
    with pytest.raises(DataError, match=r"leaves a part empty.*split_column or task\.split_file"):
        split_molecules(["CC", "CN", "CO"], SplitKind.GIVEN, 0, parts)


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
    with pytest.raises(DataError, match=r"leaves a part empty.*or task\.split=random"):
        split_molecules(["CCO", "CCN"], SplitKind.SCAFFOLD, seed=0)
    with pytest.raises(DataError, match=r"leaves a part empty.*use more molecules$"):
        split_molecules(["CCO", "CCN"], SplitKind.RANDOM, seed=0)


def test_fewer_labels_leave_the_test_part_whole_and_are_nested() -> None:
    smiles = all_smiles()
    whole = split_molecules(smiles, SplitKind.RANDOM, 0)
    small, large = (with_fewer_labels(whole, smiles, 0, train=count, valid=4) for count in (10, 30))
    assert (len(small.train), len(large.train), len(small.valid)) == (10, 30, 4)
    assert set(small.train) < set(large.train) < set(whole.train)
    np.testing.assert_array_equal(small.test, whole.test)
    other = with_fewer_labels(whole, smiles, 1, train=10, valid=4)
    assert set(other.train) != set(small.train)
    same = with_fewer_labels(whole, smiles, 0, train=None, valid=None)
    assert all(np.array_equal(*parts) for parts in zip(same, whole, strict=True))


def test_more_labels_than_a_part_has_are_refused() -> None:
    smiles = all_smiles()
    whole = split_molecules(smiles, SplitKind.RANDOM, 0)
    with pytest.raises(DataError, match=r"task\.train_molecules.*fewer than 500"):
        with_fewer_labels(whole, smiles, 0, train=500, valid=None)
