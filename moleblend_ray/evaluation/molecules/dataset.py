"""The molecules of a task in memory, with their labels, and their division into training, validation and test."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data.dataset.block import MoleculeBlock, block_from_table
from moleblend_ray.data.dataset.dataset_files import SPLITS
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import (
    AT_LEAST_PREFIX,
    AT_MOST_PREFIX,
    GRAPH_COLUMNS,
    LABEL_PREFIX,
)
from moleblend_ray.data.preparation.splits import MoleculeGroups, NamedSplits, SplitsOfData
from moleblend_ray.data.sources.classes import Alternatives, Exclusive, exclusive_places
from moleblend_ray.data.sources.records import SourceSet
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.molecules.conformer_set import ConformerSet
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorTable
from moleblend_ray.evaluation.tasks import Task, TaskKind

logger = logging.getLogger(__name__)

_LARGEST_LABEL = 1e100
"""The squares of larger numbers, which programs write for missing ones, would overflow."""
_SMALLEST_SCALE = 1e-100
"""If no label of a column is as large as this, the squares of their differences are rounded to 0."""

_MOST_WORDS = 10
"""Shown of a column's different words."""
_WRITE_NUMBERS = (
    "write classes as 0 and 1, or name their words (task.classes=[inactive,active]), and numbers with a decimal point (no comma), "
    "without units or signs such as >"
)
_MEASURE_SOME = (
    "bounds such as >10 alone do not tell the scale of labels, so some must be measured; write numbers with a decimal point (no "
    "comma) and without units"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledMolecules:
    """M molecules with T labels, and one fixed conformer or several."""

    block: MoleculeBlock
    """Graphs, and coordinates of the first conformer; ``molecule_ids`` are 0 to M - 1, the rows of ``labels``."""
    mol_ids: tuple[str, ...]
    """(M,) ids as in the source."""
    smiles: tuple[str, ...]
    """(M,) canonical SMILES."""
    labels: NDArray[np.float64]
    """(M, T) labels in the unit of the source; NaN where missing, also where only a bound is known."""
    columns: tuple[str, ...]
    """(T,) names of the labels."""
    fingerprint: str
    """Fingerprint of the prepared dataset that they come from."""
    num_unlabelled: int
    """Number of molecules of that dataset that were left out, as none of these labels is known."""
    num_quarantined: int
    """Number of source rows that could not be made into molecules."""
    num_unreadable: int = 0
    """Number of cells of these labels in the source that hold something else than a number (``>10``); they count as
    missing."""
    parts: NDArray[np.uint8] | None = None
    """(M,) part that the data assigns to each molecule, an index of ``SPLITS``; None if there are none."""
    groups: NDArray[np.int64] | None = None
    """(M,) number of the group that the data keep each molecule in; None if there are none."""
    conformers: ConformerSet | None = None
    """All conformers; None if there is only the first."""
    descriptors: DescriptorTable | None = None
    """RDKit's descriptors; None if they were not computed."""
    form: MoleculeForm = MoleculeForm()  # noqa: RUF009 (frozen)
    """Which molecules the records of the source became."""
    bounds: LabelBounds | None = None
    """Bounds of labels that have no number; None if they count as missing."""
    unit: str | None = None
    """The unit that the data state for every column; None if they state none, or several."""
    alternatives: tuple[Alternatives, ...] = ()
    """Which of the labels are the classes of one column."""

    def __len__(self) -> int:
        return len(self.block)

    @property
    def has_coordinates(self) -> NDArray[np.bool_]:
        """(M,) whether an atom of the molecule has coordinates."""
        first_atoms = np.cumsum(self.block.num_atoms, dtype=np.int64) - self.block.num_atoms
        found: NDArray[np.bool_] = np.logical_or.reduceat(self.block.position_mask, first_atoms)
        return found

    @property
    def num_conformers(self) -> int:
        """Most conformers that a molecule has; 0 if none has coordinates."""
        if not self.block.position_mask.any():
            return 0
        return 1 if self.conformers is None else int(self.conformers.counts.max())

    def take(self, indices: NDArray[np.int64]) -> LabelledMolecules:
        """The molecules at ``indices`` (K,), numbered again from 0."""
        block = dataclasses.replace(
            self.block.take(indices), molecule_ids=np.arange(len(indices), dtype=np.int64)
        )
        return dataclasses.replace(
            self,
            block=block,
            mol_ids=tuple(self.mol_ids[index] for index in indices),
            smiles=tuple(self.smiles[index] for index in indices),
            labels=self.labels[indices],
            parts=None if self.parts is None else self.parts[indices],
            groups=None if self.groups is None else self.groups[indices],
            bounds=None if self.bounds is None else self.bounds[indices],
            conformers=self.conformers and self.conformers.take(self.block.num_atoms, indices),
            descriptors=None if self.descriptors is None else self.descriptors.take(indices),
        )

    @property
    def exclusive(self) -> Exclusive:
        """Groups of columns of which one is 1."""
        return exclusive_places(self.alternatives, self.columns)

    def known(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], tuple[str, ...], LabelBounds | None, Exclusive]:
        """Labels, columns and bounds of the molecules ``rows``, as :func:`score` takes them."""
        return self.labels[rows], self.columns, self.bounds and self.bounds[rows], self.exclusive

    def with_descriptors(self) -> LabelledMolecules:
        """The same with descriptors, which are computed if they are not there."""
        if self.descriptors is not None:
            return self
        return dataclasses.replace(self, descriptors=DescriptorTable.of(self.smiles))

    def posed(
        self, indices: NDArray[np.int64], numbers: NDArray[np.int64] | None = None
    ) -> MoleculeBlock:
        """The molecules at ``indices`` (K,), each with the conformer of the given number (K,), or the first."""
        if self.conformers is None or numbers is None:
            return self.block.take(indices)
        return self.conformers.pose(self.block, indices, numbers)


def load_labelled(
    uri: str,
    task: Task,
    named: SplitsOfData | None = None,
    *,
    num_conformers: int = 1,
    with_bounds: bool = False,
) -> LabelledMolecules:
    """All molecules of the prepared dataset at ``uri`` that have at least one of the task's labels, or, ``with_bounds``, a bound
    of one.

    Each has its first ``num_conformers`` conformers, or as many as there are. Its part or group is that of ``named`` or, without
    it, the split of the dataset. Raises DataError if labels are missing or wrong, if ``named`` leaves a molecule
    out, or if the dataset keeps no bounds.
    """
    manifest = load_manifest(uri)
    columns = labels_of_task(uri, manifest, task, with_bounds=with_bounds)
    prefixes = [LABEL_PREFIX, *([AT_LEAST_PREFIX, AT_MOST_PREFIX] if with_bounds else [])]
    names = [prefix + column for prefix in prefixes for column in columns]
    table = _read_molecules(
        uri, manifest, ["mol_id", "source_row", "smiles", *GRAPH_COLUMNS, *names]
    )
    labels, *limits = (_matrix(table, prefix, columns) for prefix in prefixes)
    bounds = LabelBounds(at_least=limits[0], at_most=limits[1]) if with_bounds else None
    # A bound that is not used counts as any cell does that holds no number.
    num_unreadable = sum(
        info.num_unreadable + (0 if with_bounds else info.num_bounds or 0)
        for info in manifest.labels
        if info.name in columns
    )
    filled = labels if bounds is None else bounds.filled(labels)
    known = ~np.isnan(filled).all(axis=1)
    if not known.any():
        raise DataError(
            f"{uri}: no molecule has a value in any of the columns {list(columns)}"
            + _unreadable_remark(num_unreadable, with_bounds=with_bounds)
        )
    table = table.filter(pa.array(known)).combine_chunks()
    mol_ids = tuple(table["mol_id"].to_pylist())
    _check_labels(uri, task, columns, filled[known], mol_ids)
    if named is None:
        codes = _own_parts(manifest)[known]
    else:
        codes = _codes(named, table, manifest, uri)
    is_grouped = isinstance(named, MoleculeGroups)
    return LabelledMolecules(
        block=block_from_table(table, np.arange(len(mol_ids), dtype=np.int64)),
        mol_ids=mol_ids,
        smiles=tuple(table["smiles"].to_pylist()),
        labels=labels[known],
        bounds=None if bounds is None else bounds[known],
        columns=columns,
        fingerprint=manifest.fingerprint,
        num_unlabelled=int((~known).sum()),
        num_quarantined=manifest.counts.rows_quarantined,
        num_unreadable=num_unreadable,
        parts=None if is_grouped else codes.astype(np.uint8),
        groups=codes if is_grouped else None,
        conformers=ConformerSet.of(table, num_conformers) if num_conformers > 1 else None,
        form=MoleculeForm.of_options(manifest.options),
        unit=_common_unit(manifest, columns),
        alternatives=tuple(
            one
            for one in Alternatives.of_options(manifest.options)
            if set(one.labels) <= set(columns)
        ),
    )


def _common_unit(manifest: Manifest, columns: Sequence[str]) -> str | None:
    stated = {label.unit for label in manifest.labels if label.name in columns}
    return stated.pop() if len(stated) == 1 else None


def _matrix(table: pa.Table, prefix: str, columns: Sequence[str]) -> NDArray[np.float64]:
    """(M, T) numbers of the columns with this prefix; NaN where null."""
    values = [table[prefix + name].to_numpy(zero_copy_only=False) for name in columns]
    return np.stack([column.astype(np.float64) for column in values], axis=1)


def _read_molecules(uri: str, manifest: Manifest, columns: list[str]) -> pa.Table:
    """All molecules, split by split."""
    readers = [
        ShardReader(uri, manifest, split, columns=columns)
        for split in SPLITS
        if manifest.num_molecules(split)
    ]
    tables = [table for reader in readers for table in reader.iter_tables()]
    if not tables:
        raise DataError(f"{uri} holds no molecules: {_quarantine_sentence(manifest)}")
    return pa.concat_tables(tables)


def _own_parts(manifest: Manifest) -> NDArray[np.int64]:
    sizes = [manifest.num_molecules(split) for split in SPLITS]
    return np.repeat(np.arange(len(SPLITS), dtype=np.int64), sizes)


def _codes(named: SplitsOfData, table: pa.Table, manifest: Manifest, uri: str) -> NDArray[np.int64]:
    """(M,) part or group of each molecule of the table; ConfigError or DataError if some have none."""
    if named.names_rows and len(manifest.sources) > 1:
        raise ConfigError(
            f"task: the split is given by rows, which are those of one file; {uri} was made of "
            f"{len(manifest.sources)}. Give a split file with ids"
        )
    if isinstance(named, NamedSplits):
        named.warn_of_rows_beyond(manifest.counts.rows_in)
    mol_ids = table["mol_id"].to_pylist()
    codes = named.codes(table["source_row"].to_numpy(), mol_ids).astype(np.int64)
    unnamed = np.flatnonzero(codes == named.unnamed)
    if len(unnamed):
        first = int(unnamed[0])
        # As without the column of ids, when molecules have the name of the file and their row.
        none_known = len(unnamed) == len(codes) and not named.names_rows
        hint = "If the source has the ids in a column, set task.id_column. " if none_known else ""
        raise DataError(
            f"{uri}: the given split leaves out {len(unnamed)} of {len(codes)} labelled molecules, the first of them "
            f"{mol_ids[first]!r} (row {table['source_row'][first].as_py()} of the source). {hint}Say {named.wanted} for each, or "
            "take these molecules out of the source"
        )
    return codes


def only_used(molecules: LabelledMolecules, split: Split) -> tuple[LabelledMolecules, Split]:
    """The molecules that are in any part, numbered again, and their split."""
    used = np.sort(np.concatenate(split))
    if len(used) == len(molecules):
        return molecules, split
    return molecules.take(used), Split(*(np.searchsorted(used, part) for part in split))


def require_numbers(uri: str, sources: SourceSet, task: Task, *, with_bounds: bool = False) -> None:
    """DataError if the raw ``sources`` at ``uri`` are seen to have no label of the task before they are prepared; bounds alone,
    which are read ``with_bounds``, are none."""
    names = tuple(label.name for label in sources.labels)
    if not names:
        raise DataError(
            f"{uri} has no column of numbers for the labels of task {task.name!r}. Set task.columns to columns of your "
            f"file, and {_WRITE_NUMBERS}"
        )
    if not set(names) <= set(sources.labels_without_values):
        return
    if sources.classes:
        raise DataError(
            f"{uri}: no row has one of the classes {', '.join(sources.classes)} in any of the columns that task.columns names"
            f"{_words_found(sources.words)}. Name the classes as the file does"
        )
    raise DataError(
        f"{uri}: no row has a number in any of the columns {list(names)}{_words_found(sources.words)}: "
        + (_MEASURE_SOME if with_bounds else _WRITE_NUMBERS)
    )


def _words_found(words: Sequence[str]) -> str:
    if not words:
        return ""
    shown = ", ".join(words[:_MOST_WORDS]) + (" and others" if len(words) > _MOST_WORDS else "")
    return f", which hold {shown}"


def labels_of_task(
    uri: str, manifest: Manifest, task: Task, *, with_bounds: bool = False
) -> tuple[str, ...]:
    """The label columns of a task, or all if it names none; DataError if the prepared dataset at ``uri`` lacks one, or,
    ``with_bounds``, keeps no bounds."""
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
    if with_bounds and any(label.num_bounds is None for label in manifest.labels):
        raise DataError(
            f"task.censored: {uri} was prepared without bounds of labels, which counted as missing. Prepare it with "
            "censored_labels=true, or give the files that it was made from"
        )
    return task.columns or available


def _check_labels(
    uri: str,
    task: Task,
    columns: tuple[str, ...],
    labels: NDArray[np.float64],
    mol_ids: tuple[str, ...],
) -> None:
    if task.kind is TaskKind.REGRESSION:
        # Infinite ones included.
        wrong = np.abs(labels) > _LARGEST_LABEL
        expected = f"expected numbers up to {_LARGEST_LABEL:g}; leave cells without a value empty"
    else:
        wrong = ~np.isnan(labels) & (labels != 0) & (labels != 1)
        expected = "classification labels are 0, 1 or empty. For numbers set task.kind=regression"
    if wrong.any():
        row, index = np.argwhere(wrong)[0]
        raise DataError(
            f"{uri}: column {columns[index]!r} of task {task.name!r} has the value {labels[row, index]:g} for molecule "
            f"{mol_ids[row]!r}, the first of {int(wrong.sum())}; {expected}"
        )
    if task.kind is TaskKind.REGRESSION:
        _check_scale(uri, task, columns, labels)


def _check_scale(
    uri: str, task: Task, columns: tuple[str, ...], labels: NDArray[np.float64]
) -> None:
    for column, values in zip(columns, labels.T, strict=True):
        largest = float(np.nanmax(np.abs(values), initial=0.0))
        if 0 < largest < _SMALLEST_SCALE:
            raise DataError(
                f"{uri}: the values of column {column!r} of task {task.name!r} are at most {largest:g}, too small to "
                f"compute with; expected some of at least {_SMALLEST_SCALE:g}. Write them in another unit, or their "
                "logarithms"
            )


def _unreadable_remark(count: int, *, with_bounds: bool) -> str:
    if not count:
        return ""
    if with_bounds:
        return (
            f"; {count} of their cells hold neither a number nor a bound such as >10, or have a relation beside them that is "
            "none of >, <, = and the like, or that contradicts them"
        )
    return f"; {count} of their cells hold something else than a number: {_WRITE_NUMBERS}"


def _quarantine_sentence(manifest: Manifest) -> str:
    reasons = manifest.counts.quarantined_by_reason
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{manifest.counts.rows_in} rows were read; rejected: {listed or 'none'}"
