"""The division of molecules into training, validation and test, by what they are or by what the data say."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import FRACTIONS, Split, deal_balanced, scaffold_split
from moleblend_ray.data.dataset.dataset_files import SPLITS
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.tasks import SplitKind

logger = logging.getLogger(__name__)


def split_molecules(
    smiles: Sequence[str],
    kind: SplitKind,
    seed: int,
    parts: NDArray[np.uint8] | None = None,
    groups: NDArray[np.int64] | None = None,
) -> Split:
    """Divide molecules 80/10/10, by ``groups`` (M,) for a split by group, or into the given ``parts`` (M,). Raises DataError if a
    part would be empty."""
    if kind is SplitKind.GROUP:
        return _group_split(smiles, seed, groups)
    if kind.is_of_data:
        return _given_split(smiles, kind, parts)
    if kind is SplitKind.RANDOM:
        split = _random_split(smiles, seed)
    elif kind is SplitKind.SCAFFOLD:
        split = scaffold_split(list(smiles), FRACTIONS, variant="deepchem")
    elif kind is SplitKind.BUTINA:
        # It needs RDKit, which machines that only train need not have.
        from moleblend_ray.evaluation.splits.clusters import butina_split

        split = butina_split(smiles, FRACTIONS)
    else:
        split = scaffold_split(list(smiles), FRACTIONS, variant="chemprop-balanced", seed=seed)
    sizes = _sizes(split)
    if min(sizes.values()) == 0:
        raise DataError(
            f"the {kind.value} split of {len(smiles)} molecules leaves a part empty ({sizes}); "
            "use more molecules" + ("" if kind is SplitKind.RANDOM else ", or task.split=random")
        )
    return split


def _given_split(smiles: Sequence[str], kind: SplitKind, parts: NDArray[np.uint8] | None) -> Split:
    codes = np.zeros(len(smiles), dtype=np.uint8) if parts is None else parts
    split = Split(*(np.flatnonzero(codes == code).astype(np.int64) for code in range(len(SPLITS))))
    sizes = _sizes(split)
    if min(sizes.values()) == 0 and kind is SplitKind.TIME:
        raise DataError(
            f"the time split of {len(smiles)} molecules leaves a part empty ({sizes}), as too many have the same time; expected "
            "times in task.split_column that tell the newest fifth of them apart"
        )
    if min(sizes.values()) == 0:
        raise DataError(
            f"the given split of {len(smiles)} molecules leaves a part empty ({sizes}); expected train, valid and "
            "test. Set task.split_column or task.split_file, or give a prepared dataset with these splits"
        )
    _warn_of_shared(smiles, kind, split)
    return split


def _group_split(smiles: Sequence[str], seed: int, groups: NDArray[np.int64] | None) -> Split:
    members = groups_of(groups)
    split = deal_balanced(members, FRACTIONS, seed)
    sizes = _sizes(split)
    if min(sizes.values()) == 0:
        raise DataError(
            f"the group split of {len(smiles)} molecules in {len(members)} groups leaves a part empty ({sizes}); expected groups that "
            "are small beside a tenth of the molecules. With few or large ones, test on each in turn (task.folds, at most as many as "
            "there are groups), or say train, valid or test for each row in task.split_column with task.split=given"
        )
    _warn_of_shared(smiles, SplitKind.GROUP, split)
    return split


def groups_of(groups: NDArray[np.int64] | None) -> list[list[int]]:
    """The molecules of each group, as ascending indices, from the number (M,) of the group of each; ConfigError without these."""
    if groups is None:
        raise ConfigError(
            "task.split=group: expected a column of groups in task.split_column, found none"
        )
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    return [members.tolist() for members in np.split(order, ends)]


def _warn_of_shared(smiles: Sequence[str], kind: SplitKind, split: Split) -> None:
    train, valid, test = ({smiles[index] for index in part} for part in split)
    shared = len(test & (train | valid)) + len(train & valid)
    if shared:
        logger.warning("%d molecules are in two parts of the %s split", shared, kind.value)


def _sizes(split: Split) -> dict[str, int]:
    return dict(zip(SPLITS, map(len, split), strict=True))


def with_fewer_labels(
    split: Split, smiles: Sequence[str], seed: int, *, train: int | None, valid: int | None
) -> Split:
    """The split with only ``train`` and ``valid`` molecules in these parts (None: all), and the whole test part.

    A hash of seed and SMILES decides which. So a smaller number takes a subset of what a larger one takes, and adding
    molecules to a part changes little. Raises DataError if a part has fewer molecules.
    """
    parts = {}
    for name, most in (("train", train), ("valid", valid)):
        part = getattr(split, name)
        if most is not None and most > len(part):
            raise DataError(
                f"task.{name}_molecules: the {name} part of the split has {len(part)} molecules, fewer than {most}"
            )
        order = _hash_order([smiles[index] for index in part], seed)
        parts[name] = np.sort(part[order[:most]])
    return split._replace(**parts)


def _hash_order(smiles: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Indices in the order of a seeded hash of the SMILES, so that copies of a molecule stay together."""
    keys = [hashlib.sha256(f"{seed}:{text}".encode()).digest() for text in smiles]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _random_split(smiles: Sequence[str], seed: int) -> Split:
    order = _hash_order(smiles, seed)
    first = round(FRACTIONS[0] * len(order))
    second = round((FRACTIONS[0] + FRACTIONS[1]) * len(order))
    cuts = [_past_copies(smiles, order, cut) for cut in (first, second)]
    train, valid, test = np.split(order, cuts)
    return Split(train=np.sort(train), valid=np.sort(valid), test=np.sort(test))


def _past_copies(smiles: Sequence[str], order: NDArray[np.int64], cut: int) -> int:
    while 0 < cut < len(order) and smiles[order[cut]] == smiles[order[cut - 1]]:
        cut += 1
    return cut
