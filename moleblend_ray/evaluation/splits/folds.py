"""The folds of a cross-validation: every molecule is tested once, by models that it had no part in.

Of K folds, run k tests on fold k, chooses by the next one, and trains on the K - 2 others. So no choice is made on what is tested, as
it is where one part serves for both. Molecules that a split of the same kind keeps together (of one scaffold, of one cluster,
copies) are in one fold.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split, scaffold_groups
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.splits.split import groups_of
from moleblend_ray.evaluation.tasks import SplitKind

logger = logging.getLogger(__name__)

_UNEVEN: Final = 1.5
"""Size of a fold, in shares of the usual one, from which on results are told to be uneven."""


def fold_numbers(
    smiles: Sequence[str],
    kind: SplitKind,
    seed: int,
    count: int,
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """(M,) the fold of each molecule, 0 to ``count`` - 1, of nearly equal sizes.

    Groups of molecules are dealt one after the other, each to the smallest fold so far. ``random``: copies of a molecule are a
    group, in an order by ``seed``. ``scaffold`` and ``butina``: scaffolds or clusters, the largest first; nothing is random.
    ``scaffold_balanced``: scaffolds larger than half a fold first, the others after them, both in an order by ``seed``; ``group``:
    those of ``groups`` (M,), likewise. By scaffold, a molecule without rings is a group of its own, with its copies. Raises
    DataError if there are fewer groups than folds.
    """
    ordered = _ordered_groups(smiles, kind, seed, len(smiles) / count, groups)
    if len(ordered) < count:
        raise DataError(
            f"task.folds={count}: {len(smiles)} molecules make {len(ordered)} groups that a {kind.value} split keeps together, "
            "fewer than folds. Take fewer folds or more molecules"
            + ("" if kind is SplitKind.RANDOM else ", or task.split=random")
        )
    numbers = np.empty(len(smiles), dtype=np.int64)
    sizes = np.zeros(count, dtype=np.int64)
    for group in ordered:
        smallest = int(sizes.argmin())
        numbers[group] = smallest
        sizes[smallest] += len(group)
    if sizes.max() * count > _UNEVEN * len(smiles):
        logger.warning(
            "the folds have %d to %d molecules, as one group that a %s split keeps together has %d",
            sizes.min(),
            sizes.max(),
            kind.value,
            max(map(len, ordered)),
        )
    return numbers


def split_of_fold(numbers: NDArray[np.int64], fold: int, count: int) -> Split:
    """The split that tests on ``fold`` of ``count``, chooses by the next one (after the last, the first) and trains on the
    others; ``numbers`` (M,) are those of :func:`fold_numbers`."""
    is_test, is_valid = numbers == fold, numbers == (fold + 1) % count
    parts = ~(is_test | is_valid), is_valid, is_test
    return Split(*(np.flatnonzero(part).astype(np.int64) for part in parts))


def _ordered_groups(
    smiles: Sequence[str],
    kind: SplitKind,
    seed: int,
    fold_size: float,
    groups_of_data: NDArray[np.int64] | None,
) -> list[list[int]]:
    """The indices of molecules that stay together, in the order in which they are dealt."""
    if kind is SplitKind.RANDOM:
        return _shuffled(_copies(smiles, range(len(smiles))), smiles, seed)
    if kind is SplitKind.BUTINA:
        # It needs RDKit, which machines that only train need not have.
        from moleblend_ray.evaluation.splits.clusters import butina_groups

        groups = butina_groups(smiles)
    elif kind is SplitKind.GROUP:
        groups = groups_of(groups_of_data)
    else:
        by_scaffold = scaffold_groups(smiles)
        # They have no rings in common: as one group they would be an uneven fold, of ESOL a third of all molecules.
        without_rings = by_scaffold.pop("", [])
        groups = [*by_scaffold.values(), *_copies(smiles, without_rings)]
    if kind in (SplitKind.SCAFFOLD_BALANCED, SplitKind.GROUP):
        shuffled = _shuffled(groups, smiles, seed)
        return sorted(shuffled, key=lambda group: len(group) <= fold_size / 2)
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def _copies(smiles: Sequence[str], rows: Iterable[int]) -> list[list[int]]:
    """Those of ``rows`` with equal SMILES together."""
    groups: dict[str, list[int]] = {}
    for index in rows:
        groups.setdefault(smiles[index], []).append(index)
    return list(groups.values())


def _shuffled(groups: Iterable[list[int]], smiles: Sequence[str], seed: int) -> list[list[int]]:
    """The groups in an order by a hash of ``seed`` and their first SMILES in alphabetical order."""

    def key(group: list[int]) -> bytes:
        first = min(smiles[index] for index in group)
        return hashlib.sha256(f"{seed}:{first}".encode()).digest()

    return sorted(groups, key=key)
