"""Folds keep together what a split keeps together, are of even size, and test every molecule once."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from moleblend_ray.chemistry.scaffolds import murcko_scaffold
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.splits.clusters import butina_groups
from moleblend_ray.evaluation.splits.folds import fold_numbers, split_of_fold
from moleblend_ray.evaluation.tasks import SplitKind

RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccsc1", "c1ccoc1", "C1CCOCC1")
WITH_RINGS = [f"{'C' * length}{ring}" for ring in RINGS for length in range(1, 10)]
CHAINS = ["C" * length + "O" for length in range(1, 28)]
MOLECULES = [*WITH_RINGS, *CHAINS, *WITH_RINGS[:5]]

GROUPS = np.append(np.arange(len(MOLECULES) - 5) // 4, [0, 0, 0, 0, 1])
"""Copies are in the group of the first ones."""

KINDS = (
    SplitKind.RANDOM,
    SplitKind.SCAFFOLD,
    SplitKind.SCAFFOLD_BALANCED,
    SplitKind.BUTINA,
    SplitKind.GROUP,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 5])
def test_every_molecule_is_tested_once_and_chosen_by_once(kind: SplitKind, count: int) -> None:
    numbers = fold_numbers(MOLECULES, kind, 0, count, GROUPS)
    splits = [split_of_fold(numbers, fold, count) for fold in range(count)]
    everything = list(range(len(MOLECULES)))
    for part in ("valid", "test"):
        assert sorted(np.concatenate([getattr(split, part) for split in splits])) == everything
    for split in splits:
        assert sorted(np.concatenate(split)) == everything
    # What chooses in a run is what the next one is tested on.
    for split, after in zip(splits, [*splits[1:], splits[0]], strict=True):
        np.testing.assert_array_equal(split.valid, after.test)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 5, 7])
def test_folds_differ_by_no_more_than_the_largest_group(kind: SplitKind, count: int) -> None:
    sizes = np.bincount(fold_numbers(MOLECULES, kind, 0, count, GROUPS), minlength=count)
    largest = {SplitKind.RANDOM: 2, SplitKind.BUTINA: max(map(len, butina_groups(MOLECULES)))}
    assert sizes.max() - sizes.min() <= largest.get(kind, 14)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_in_one_fold(kind: SplitKind) -> None:
    numbers = fold_numbers(MOLECULES, kind, 3, 4, GROUPS)
    np.testing.assert_array_equal(numbers[-5:], numbers[:5])


@pytest.mark.parametrize("kind", [SplitKind.SCAFFOLD, SplitKind.SCAFFOLD_BALANCED])
def test_a_scaffold_is_in_one_fold_and_chains_are_in_all(kind: SplitKind) -> None:
    numbers = fold_numbers(MOLECULES, kind, 0, 4)
    of_scaffold: dict[str, set[int]] = {}
    for text, fold in zip(MOLECULES, numbers.tolist(), strict=True):
        of_scaffold.setdefault(murcko_scaffold(text), set()).add(fold)
    assert of_scaffold.pop("") == {0, 1, 2, 3}
    assert all(len(folds) == 1 for folds in of_scaffold.values())


def test_a_cluster_is_in_one_fold() -> None:
    numbers = fold_numbers(MOLECULES, SplitKind.BUTINA, 0, 4)
    groups = butina_groups(MOLECULES)
    assert any(len(group) > 1 for group in groups)
    assert all(len(set(numbers[group].tolist())) == 1 for group in groups)


def test_a_group_of_the_data_is_in_one_fold_and_large_ones_are_dealt_first() -> None:
    groups = np.random.default_rng(0).permutation(np.append(np.zeros(20, int), np.arange(75) + 1))
    for seed in range(5):
        numbers = fold_numbers(MOLECULES, SplitKind.GROUP, seed, 4, groups)
        assert len(set(numbers[groups == 0])) == 1
        assert sorted(np.bincount(numbers)) == [23, 24, 24, 24]


def test_as_many_folds_as_groups_test_on_each_group() -> None:
    groups = np.arange(len(MOLECULES)) % 4
    numbers = fold_numbers(MOLECULES, SplitKind.GROUP, 0, 4, groups)
    assert sorted(set(zip(groups.tolist(), numbers.tolist(), strict=True))) == [
        (group, numbers[group]) for group in range(4)
    ]
    assert sorted(numbers[:4]) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [SplitKind.RANDOM, SplitKind.SCAFFOLD_BALANCED, SplitKind.GROUP])
def test_seeded_folds_change_with_the_seed_alone_and_not_with_the_order(kind: SplitKind) -> None:
    numbers = fold_numbers(MOLECULES, kind, 0, 4, GROUPS)
    assert (numbers != fold_numbers(MOLECULES, kind, 1, 4, GROUPS)).any()
    order = np.random.default_rng(0).permutation(len(MOLECULES))
    again = fold_numbers([MOLECULES[index] for index in order], kind, 0, 4, GROUPS[order])
    np.testing.assert_array_equal(again, numbers[order])


@pytest.mark.parametrize("kind", [SplitKind.SCAFFOLD, SplitKind.BUTINA])
def test_other_folds_need_no_seed(kind: SplitKind) -> None:
    first, second = (fold_numbers(MOLECULES, kind, seed, 4) for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_large_scaffolds_are_dealt_first_and_leave_folds_even() -> None:
    molecules = [*CHAINS, *WITH_RINGS[9:], *(f"{'C' * n}c1ccccc1" for n in range(1, 31))]
    sizes = np.bincount(fold_numbers(molecules, SplitKind.SCAFFOLD, 0, 3))
    assert sizes.max() - sizes.min() <= 1
    for seed in range(20):
        sizes = np.bincount(fold_numbers(molecules, SplitKind.SCAFFOLD_BALANCED, seed, 3))
        assert sizes.max() - sizes.min() <= 9


def test_fewer_groups_than_folds_are_an_error() -> None:
    with pytest.raises(DataError, match=r"task\.folds=8.*63 molecules make 7 groups.*split=random"):
        fold_numbers(WITH_RINGS, SplitKind.SCAFFOLD, 0, 8)
    with pytest.raises(DataError, match=r"task\.folds=5: 95 .* 4 groups that a group split keeps"):
        fold_numbers(MOLECULES, SplitKind.GROUP, 0, 5, np.arange(len(MOLECULES)) % 4)
    with pytest.raises(DataError, match="2 molecules make 2 groups"):
        fold_numbers(["CC", "CCC"], SplitKind.RANDOM, 0, 3)


def test_uneven_folds_are_told(caplog: pytest.LogCaptureFixture) -> None:
    molecules = [*(f"{'C' * n}c1ccccc1" for n in range(1, 61)), *CHAINS]
    with caplog.at_level(logging.WARNING):
        fold_numbers(MOLECULES, SplitKind.SCAFFOLD, 0, 4)
        assert not caplog.records
        fold_numbers(molecules, SplitKind.SCAFFOLD, 0, 4)
    assert "the folds have 9 to 60 molecules, as one group" in caplog.text
