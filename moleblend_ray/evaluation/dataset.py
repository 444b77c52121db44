"""The molecules of a task in memory, with their labels, and their division into training, validation and test."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split, scaffold_split
from moleblend_ray.data.block import MoleculeBlock, block_from_table
from moleblend_ray.data.shards import (
    GRAPH_COLUMNS,
    LABEL_PREFIX,
    SPLITS,
    Manifest,
    ShardReader,
    load_manifest,
)
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.tasks import SplitKind, Task, TaskKind

FRACTIONS = (0.8, 0.1, 0.1)
"""Shares of training, validation and test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledMolecules:
    """M molecules, one fixed conformer each, with T labels."""

    block: MoleculeBlock
    """Graphs and coordinates; ``molecule_ids`` are 0 to M - 1, rows of ``labels``."""
    mol_ids: tuple[str, ...]
    """(M,) ids as in the source."""
    smiles: tuple[str, ...]
    """(M,) canonical SMILES."""
    labels: NDArray[np.float64]
    """(M, T) in the source's unit; NaN where missing."""
    columns: tuple[str, ...]
    """(T,) names of the labels."""
    fingerprint: str
    """Fingerprint of the prepared dataset they come from."""
    num_unlabelled: int
    """Molecules of that dataset left out because none of these labels is known."""
    num_quarantined: int
    """Rows of the source that could not become molecules."""

    def __len__(self) -> int:
        return len(self.block)

    def take(self, indices: NDArray[np.int64]) -> LabelledMolecules:
        """The molecules at ``indices`` (K,), numbered anew from 0."""
        block = dataclasses.replace(
            self.block.take(indices), molecule_ids=np.arange(len(indices), dtype=np.int64)
        )
        return dataclasses.replace(
            self,
            block=block,
            mol_ids=tuple(self.mol_ids[index] for index in indices),
            smiles=tuple(self.smiles[index] for index in indices),
            labels=self.labels[indices],
        )


def load_labelled(uri: str, task: Task) -> LabelledMolecules:
    """Every molecule of the prepared dataset at ``uri`` that has at least one of the task's labels."""
    manifest = load_manifest(uri)
    columns = _label_columns(uri, manifest, task)
    names = [LABEL_PREFIX + column for column in columns]
    readers = [
        ShardReader(uri, manifest, split, columns=["mol_id", "smiles", *GRAPH_COLUMNS, *names])
        for split in SPLITS
        if manifest.num_molecules(split)
    ]
    tables = [table for reader in readers for table in reader.iter_tables()]
    if not tables:
        raise DataError(f"{uri} holds no molecules: {_quarantine_sentence(manifest)}")
    table = pa.concat_tables(tables)
    labels = np.stack(
        [table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in names], axis=1
    )
    known = ~np.isnan(labels).all(axis=1)
    if not known.any():
        raise DataError(f"{uri}: no molecule has a value in any of the columns {list(columns)}")
    table = table.filter(pa.array(known)).combine_chunks()
    labels = labels[known]
    _check_labels(uri, task, columns, labels)
    return LabelledMolecules(
        block=block_from_table(table, np.arange(len(labels), dtype=np.int64)),
        mol_ids=tuple(table["mol_id"].to_pylist()),
        smiles=tuple(table["smiles"].to_pylist()),
        labels=labels,
        columns=columns,
        fingerprint=manifest.fingerprint,
        num_unlabelled=int((~known).sum()),
        num_quarantined=manifest.counts.rows_quarantined,
    )


def split_molecules(smiles: Sequence[str], kind: SplitKind, seed: int) -> Split:
    """Divide molecules 80/10/10; a DataError if a part would be empty."""
    if kind is SplitKind.RANDOM:
        split = _random_split(smiles, seed)
    elif kind is SplitKind.SCAFFOLD:
        split = scaffold_split(list(smiles), FRACTIONS, variant="deepchem")
    else:
        split = scaffold_split(list(smiles), FRACTIONS, variant="chemprop-balanced", seed=seed)
    sizes = {name: len(getattr(split, name)) for name in ("train", "valid", "test")}
    if min(sizes.values()) == 0:
        raise DataError(
            f"the {kind.value} split of {len(smiles)} molecules leaves a part empty ({sizes}); "
            "use more molecules, or task.split=random"
        )
    return split


def _random_split(smiles: Sequence[str], seed: int) -> Split:
    """Molecules in the order of a seeded hash of their SMILES, so that copies stay together."""
    keys = [hashlib.sha256(f"{seed}:{text}".encode()).digest() for text in smiles]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    first = round(FRACTIONS[0] * len(order))
    second = round((FRACTIONS[0] + FRACTIONS[1]) * len(order))
    cuts = [_past_copies(smiles, order, cut) for cut in (first, second)]
    train, valid, test = np.split(order, cuts)
    return Split(train=np.sort(train), valid=np.sort(valid), test=np.sort(test))


def _past_copies(smiles: Sequence[str], order: NDArray[np.int64], cut: int) -> int:
    while 0 < cut < len(order) and smiles[order[cut]] == smiles[order[cut - 1]]:
        cut += 1
    return cut


def _label_columns(uri: str, manifest: Manifest, task: Task) -> tuple[str, ...]:
    available = manifest.label_names()
    if not available:
        raise DataError(
            f"{uri} holds no label columns; prepare it from a table with numeric columns besides the SMILES"
        )
    missing = [column for column in task.columns if column not in available]
    if missing:
        shown = ", ".join(available[:20]) + (", ..." if len(available) > 20 else "")
        raise DataError(
            f"task {task.name!r} needs the label columns {missing}, which {uri} does not have; it has: {shown}. "
            "Set task.columns to the columns of your file"
        )
    return task.columns or available


def _check_labels(
    uri: str, task: Task, columns: tuple[str, ...], labels: NDArray[np.float64]
) -> None:
    infinite = np.isinf(labels)
    if infinite.any():
        column = columns[int(np.flatnonzero(infinite.any(axis=0))[0])]
        raise DataError(f"{uri}: column {column!r} has infinite values; leave such cells empty")
    if task.kind is TaskKind.REGRESSION:
        return
    wrong = ~np.isnan(labels) & (labels != 0) & (labels != 1)
    if wrong.any():
        row, index = np.argwhere(wrong)[0]
        raise DataError(
            f"{uri}: column {columns[index]!r} of task {task.name!r} has the value {labels[row, index]:g}; "
            "classification labels are 0, 1 or empty. For numbers set task.kind=regression"
        )


def _quarantine_sentence(manifest: Manifest) -> str:
    reasons = manifest.counts.quarantined_by_reason
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{manifest.counts.rows_in} rows were read; rejected: {listed or 'none'}"
