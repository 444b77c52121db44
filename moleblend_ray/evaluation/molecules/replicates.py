"""Molecules with several rows in a table: how far their labels are apart, and one label in place of them.

Tables of assays hold repeated measurements. The standard deviation within a molecule, pooled over all of them, is the error that
a model would have on single measurements if it knew the true values.

Shape legend: M molecules (rows of the table), T properties, G different molecules.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.tasks import ReplicateRule, TaskKind


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpread:
    """How labels of one property differ within molecules that have several."""

    molecules: int
    """Number of molecules with more than one label."""
    std: float | None
    """Standard deviation within such molecules, pooled, in the labels' unit; None for classes and without such molecules."""
    contradictory: int | None
    """Number of molecules that have both classes; None for numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicates:
    """Molecules that have several rows (equal canonical SMILES), and what became of these."""

    rule: ReplicateRule
    molecules: int
    """Number of such molecules."""
    rows: int
    """Number of their rows."""
    spreads: dict[str, LabelSpread]
    """Property -> differences of its labels."""
    undecided: int = 0
    """Number of labels that are missing after the merge, as those of the molecule contradict each other."""
    dropped: int = 0
    """Number of molecules that have no other label than such, and were left out."""

    def to_json(self) -> dict[str, Any]:
        """The part of ``results.json`` about replicates."""
        return {
            "rule": self.rule.value,
            "molecules": self.molecules,
            "rows": self.rows,
            "undecided": self.undecided,
            "dropped": self.dropped,
            "columns": {
                name: {
                    key: value
                    for key, value in dataclasses.asdict(spread).items()
                    if value is not None
                }
                for name, spread in self.spreads.items()
            },
        }


def with_replicates(
    molecules: LabelledMolecules, kind: TaskKind, rule: ReplicateRule, *, within_parts: bool
) -> tuple[LabelledMolecules, Replicates]:
    """The molecules with their replicates as ``rule`` says, and what was found.

    A merged molecule is its first row with other labels. Of numbers that is the mean or the median of those that were measured,
    and if there are none, what all bounds allow. Of classes it is the most frequent one, by either rule. Labels that contradict
    each other (of classes as frequent as each other, bounds that exclude each other) are missing. ``within_parts`` keeps rows in different
    parts of the data apart. DataError if no label is left.
    """
    group, first = _groups(molecules, within_parts=within_parts)
    sizes = np.bincount(group)
    found = Replicates(
        rule=rule,
        molecules=int((sizes > 1).sum()),
        rows=int(sizes[sizes > 1].sum()),
        spreads={
            name: _spread(kind, molecules.labels[:, index], group)
            for index, name in enumerate(molecules.columns)
        },
    )
    if rule is ReplicateRule.KEEP or not found.molecules:
        return molecules, found
    labels = np.stack([_merged(kind, rule, values, group) for values in molecules.labels.T], axis=1)
    for places in molecules.exclusive:
        labels[:, places] = _most_frequent(molecules.labels[:, places], group)
    bounds = molecules.bounds and _merged_bounds(molecules.bounds, labels, group)
    filled = labels if bounds is None else bounds.filled(labels)
    before = (
        molecules.labels if molecules.bounds is None else molecules.bounds.filled(molecules.labels)
    )
    had_some = np.zeros(filled.shape, dtype=np.bool_)
    np.logical_or.at(had_some, group, ~np.isnan(before))
    kept = np.flatnonzero(~np.isnan(filled).all(axis=1))
    if not len(kept):
        raise DataError(
            f"task.replicates={rule}: no molecule is left, as the labels of each of the {len(first)} contradict each other, "
            f"such as those of {molecules.mol_ids[0]!r} ({molecules.smiles[0]}). Expected rows of one molecule that mostly agree: "
            "check the label columns, or keep all rows (task.replicates=keep)"
        )
    merged = dataclasses.replace(
        molecules.take(first[kept]), labels=labels[kept], bounds=bounds and bounds[kept]
    )
    return merged, dataclasses.replace(
        found,
        undecided=int((had_some & np.isnan(filled)).sum()),
        dropped=len(first) - len(kept),
    )


def _groups(
    molecules: LabelledMolecules, *, within_parts: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(M,) number of the molecule of each row, in the order of their first rows, and (G,) these rows."""
    parts = molecules.parts if within_parts else None
    number: dict[tuple[str, int], int] = {}
    group = np.empty(len(molecules.smiles), dtype=np.int64)
    for row, text in enumerate(molecules.smiles):
        key = text, 0 if parts is None else int(parts[row])
        group[row] = number.setdefault(key, len(number))
    _, first = np.unique(group, return_index=True)
    return group, first.astype(np.int64)


def _spread(kind: TaskKind, values: NDArray[np.float64], group: NDArray[np.int64]) -> LabelSpread:
    known = ~np.isnan(values)
    values, group = values[known], group[known]
    counts = np.bincount(group)
    several = int((counts > 1).sum())
    means = _means(values, group, len(counts))
    if kind is TaskKind.CLASSIFICATION:
        mixed = int(((means > 0) & (means < 1)).sum())
        return LabelSpread(molecules=several, std=None, contradictory=mixed)
    if not several:
        return LabelSpread(molecules=0, std=None, contradictory=None)
    squares = float(((values - means[group]) ** 2).sum())
    degrees = int((counts[counts > 1] - 1).sum())
    return LabelSpread(molecules=several, std=float(np.sqrt(squares / degrees)), contradictory=None)


def _merged(
    kind: TaskKind, rule: ReplicateRule, values: NDArray[np.float64], group: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(G,) one label of each molecule from those of its rows (M,); NaN where there is none or they contradict each other."""
    count = int(group.max()) + 1
    known = ~np.isnan(values)
    values, group = values[known], group[known]
    if kind is TaskKind.REGRESSION:
        merge = _means if rule is ReplicateRule.MEAN else _medians
        return merge(values, group, count)
    means = _means(values, group, count)
    return np.where(means == 0.5, np.nan, np.round(means))


def _most_frequent(labels: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """(G, K) labels of K classes, of which one is 1, from those of the rows (M, K): 1 for the most frequent class of each
    molecule, NaN for all that are it together, and where nothing is known."""
    counts = np.stack(
        [np.bincount(group, weights=column == 1, minlength=group.max() + 1) for column in labels.T],
        axis=1,
    )
    most = counts == counts.max(axis=1, keepdims=True)
    return np.where(most, np.where(most.sum(axis=1, keepdims=True) == 1, 1.0, np.nan), 0.0)


def _means(
    values: NDArray[np.float64], group: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """(count,) mean of the values of each group, exactly the value where all are equal; NaN where there are none."""
    sizes = np.bincount(group, minlength=count)
    start = np.zeros(count)
    # The last of each group: any would do.
    start[group] = values
    sums = np.bincount(group, weights=values - start[group], minlength=count)
    return np.where(sizes > 0, start + sums / np.maximum(sizes, 1), np.nan)


def _medians(
    values: NDArray[np.float64], group: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """(count,) median of the values of each group; NaN where there are none."""
    ordered = values[np.lexsort((values, group))]
    sizes = np.bincount(group, minlength=count)
    begin = np.cumsum(sizes) - sizes
    found = np.full(count, np.nan)
    has = sizes > 0
    below, above = (begin + (sizes - 1) // 2)[has], (begin + sizes // 2)[has]
    found[has] = ordered[below] + (ordered[above] - ordered[below]) / 2
    return found


def _merged_bounds(
    bounds: LabelBounds, labels: NDArray[np.float64], group: NDArray[np.int64]
) -> LabelBounds:
    """(G, T) the narrowest bounds of the rows of each molecule where its merged ``labels`` (G, T) are unknown; none where no
    value is allowed by all."""
    at_least, at_most = (np.full(labels.shape, np.nan) for _ in range(2))
    np.fmax.at(at_least, group, bounds.at_least)
    np.fmin.at(at_most, group, bounds.at_most)
    known = np.isnan(labels) & ~(at_least > at_most)
    return LabelBounds(
        at_least=np.where(known, at_least, np.nan), at_most=np.where(known, at_most, np.nan)
    )
