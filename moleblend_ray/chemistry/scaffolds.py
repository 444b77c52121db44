"""Bemis-Murcko scaffolds and the two scaffold splits in common use.

Both keep all molecules of one scaffold in one part, so that the test set consists of ring systems that the model has
not seen. As they give quite different test sets, each result names its variant and the hash of its split.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.cost import smiles_may_be_slow
from moleblend_ray.chemistry.limited import LimitExceededError, limited
from moleblend_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

ScaffoldVariant = Literal["deepchem", "chemprop-balanced"]


FRACTIONS: Final = (0.8, 0.1, 0.1)
"""Shares of the molecules for training, selection and testing."""


class Split(NamedTuple):
    """The molecules for training, selection and testing: disjoint, ascending indices that cover all molecules."""

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]


def murcko_scaffold(smiles: str) -> str:
    """SMILES, without stereo, of the ring systems and the linkers between them; empty for a molecule without rings.

    Raises DataError if RDKit cannot read the molecule or finds no scaffold of it, or takes longer than half a minute
    (only for molecules of many rings).
    """
    if not smiles_may_be_slow(smiles):
        found: str | DataError = scaffold_or_error(smiles)
    else:
        try:
            found = limited(scaffold_or_error, smiles)
        except LimitExceededError as error:
            raise DataError(
                f"no scaffold of {smiles!r}: it is too complex for RDKit ({error})"
            ) from error
    if isinstance(found, DataError):
        raise found
    return found


def scaffold_or_error(smiles: str) -> str | DataError:
    """What :func:`murcko_scaffold` returns or raises, however long it takes."""
    # Imported here, as machines that only train use splits too, but have no RDKit.
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold

    with rdBase.BlockLogs():
        mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
        if mol is None:
            return DataError(f"no scaffold of {smiles!r}: it is not a SMILES that RDKit can read")
        try:
            scaffold = MurckoScaffold.GetScaffoldForMol(mol)  # type: ignore[no-untyped-call]
            return Chem.MolToSmiles(scaffold, isomericSmiles=False)
        except Exception as error:  # RDKit raises various classes, such as AtomValenceException
            reason = " ".join(str(error).split())
            return DataError(f"no scaffold of {smiles!r}: {reason}")


def scaffold_split(
    smiles: Sequence[str],
    fractions: tuple[float, float, float] = FRACTIONS,
    *,
    variant: ScaffoldVariant = "deepchem",
    seed: int = 0,
) -> Split:
    """Split molecules by scaffold into train, valid and test.

    ``deepchem``: scaffolds are sorted by size, largest first (among equal sizes, the later one in the file first). Each
    goes to train if that stays within its share, else to valid likewise, else to test. Nothing is random: ``seed`` is
    not used. ``chemprop-balanced``: scaffolds larger than half of valid or test come first, in random order, then all
    others in random order, so that every part contains rare and common scaffolds.

    What a scaffold is, and what counts as one: :func:`scaffold_groups`.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"fractions must be shares that sum to 1, found {fractions}")
    groups = list(scaffold_groups(smiles).values())
    if variant == "deepchem":
        ordered = sorted(groups, key=lambda group: (len(group), group[0]), reverse=True)
        return deal_largest_first(ordered, fractions)
    return deal_balanced(groups, fractions, seed)


def scaffold_groups(smiles: Sequence[str]) -> dict[str, list[int]]:
    """Murcko scaffold -> its molecules, as ascending indices; in the order of their first ones.

    Those without rings have one scaffold in common, the empty one. A molecule of which RDKit finds no scaffold (some with metals;
    it also writes a few SMILES that it cannot read) counts as a scaffold of its own, with a warning.
    """
    groups: dict[str, list[int]] = {}
    problems: list[DataError] = []
    for index, text in enumerate(smiles):
        try:
            scaffold = murcko_scaffold(text)
        except DataError as error:
            problems.append(error)
            scaffold = text
        groups.setdefault(scaffold, []).append(index)
    if problems:
        logger.warning(
            "%d of %d molecules count as scaffolds of their own: %s",
            len(problems),
            len(smiles),
            problems[0],
        )
    return groups


def split_hash(split: Split) -> str:
    """16 hexadecimal digits that identify a split: they are equal if all three parts are."""
    digest = hashlib.sha256()
    for part in split:
        digest.update(np.int64(len(part)).tobytes())
        digest.update(np.asarray(part, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def deal_largest_first(
    groups: Sequence[Sequence[int]], fractions: tuple[float, float, float]
) -> Split:
    """DeepChem's rule for groups in the order of their size: valid may also fill what train has left of its share."""
    total = sum(map(len, groups))
    train_end, valid_end = total * fractions[0], total * sum(fractions[:2])
    train: list[int] = []
    valid: list[int] = []
    test: list[int] = []
    for group in groups:
        if len(train) + len(group) <= train_end:
            train += group
        elif len(train) + len(valid) + len(group) <= valid_end:
            valid += group
        else:
            test += group
    return _split(train, valid, test)


def deal_balanced(
    groups: Sequence[list[int]], fractions: tuple[float, float, float], seed: int
) -> Split:
    """Chemprop's rule: groups larger than half of valid or test first, in random order, then all others in random order. Train and
    valid stay within their shares; what does not fit goes to test."""
    total = sum(map(len, groups))
    sizes = [share * total for share in fractions]
    return _fill(_balanced_order(groups, sizes, seed), sizes)


def _balanced_order(
    groups: Sequence[list[int]], sizes: Sequence[float], seed: int
) -> list[list[int]]:
    big = [g for g in groups if len(g) > sizes[1] / 2 or len(g) > sizes[2] / 2]
    small = [g for g in groups if not (len(g) > sizes[1] / 2 or len(g) > sizes[2] / 2)]
    shuffler = random.Random(seed)
    shuffler.shuffle(big)
    shuffler.shuffle(small)
    return big + small


def _fill(groups: Sequence[Sequence[int]], sizes: Sequence[float]) -> Split:
    train: list[int] = []
    valid: list[int] = []
    test: list[int] = []
    for group in groups:
        if len(train) + len(group) <= sizes[0]:
            train += group
        elif len(valid) + len(group) <= sizes[1]:
            valid += group
        else:
            test += group
    return _split(train, valid, test)


def _split(train: Sequence[int], valid: Sequence[int], test: Sequence[int]) -> Split:
    return Split(*(np.array(sorted(part), dtype=np.int64) for part in (train, valid, test)))
