"""A block of molecules as flat arrays, the input of the relation kernels and of the packing of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from moleblend_ray.compilation import kernel
from moleblend_ray.errors import DataError
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES, NUM_DESCRIPTORS

if TYPE_CHECKING:  # benchmarks of the model need no pyarrow
    import pyarrow as pa

NUM_ATOM_FEATURES: Final = len(ATOM_VOCAB_SIZES)
NUM_BOND_FEATURES: Final = len(BOND_VOCAB_SIZES)
NUM_AXES: Final = 3
"""Coordinates of a position."""
BOND_ENDS: Final = 2
"""Atoms of a bond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoleculeBlock:
    """M molecules, one conformer each, molecule-major: A atoms and E undirected bonds in all."""

    molecule_ids: NDArray[np.int64]
    """(M,) int64, position of each molecule within its split."""

    num_atoms: NDArray[np.int32]
    """(M,) int32."""

    num_bonds: NDArray[np.int32]
    """(M,) int32, undirected."""

    atom_features: NDArray[np.uint8]
    """(A, 9) uint8 OGB codes."""

    bonds: NDArray[np.uint16]
    """(E, 2) uint16, atom indices within the molecule."""

    bond_features: NDArray[np.uint8]
    """(E, 3) uint8 OGB codes."""

    positions: NDArray[np.float32]
    """(A, 3) float32, angstrom. Rows where ``position_mask`` is False are undefined."""

    position_mask: NDArray[np.bool_]
    """(A,) bool, True where the atom has coordinates."""

    descriptors: NDArray[np.float32]
    """(M, D) float32, NaN where unknown; D is ``vocabulary.NUM_DESCRIPTORS``, or 0 if they were not read."""

    def __len__(self) -> int:
        return len(self.molecule_ids)

    def take(self, indices: NDArray[np.int64]) -> MoleculeBlock:
        """The molecules at ``indices``, in that order."""
        atoms = ragged_rows(self.num_atoms, indices)
        bonds = ragged_rows(self.num_bonds, indices)
        return MoleculeBlock(
            molecule_ids=self.molecule_ids[indices],
            num_atoms=self.num_atoms[indices],
            num_bonds=self.num_bonds[indices],
            atom_features=self.atom_features[atoms],
            bonds=self.bonds[bonds],
            bond_features=self.bond_features[bonds],
            positions=self.positions[atoms],
            position_mask=self.position_mask[atoms],
            descriptors=self.descriptors[indices],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphColumns:
    """The graph columns of R shard rows, checked, as flat arrays that are views of the table where possible."""

    rows: NDArray[np.int64]
    """(R, 6) int64, columns ``ROW_FIELDS``. A row is shorter than a cache line."""

    atom_features: NDArray[np.uint8]
    """(A, 9) uint8."""

    bonds: NDArray[np.uint16]
    """(E, 2) uint16."""

    bond_features: NDArray[np.uint8]
    """(E, 3) uint8."""

    positions: NDArray[np.float32]
    """(C, 3) float32, one conformer of a molecule after the other."""

    position_mask: NDArray[np.bool_]
    """(C,) bool."""

    descriptors: NDArray[np.float32]
    """(R, D) float32; D is 0 if they were not read."""

    addresses: NDArray[np.uint64] = field(init=False, repr=False)
    """(7,) uint64, the memory address of each of the arrays above, in their order."""

    def __post_init__(self) -> None:
        """Note the addresses: a kernel that reads from many of these objects gets them in one array."""
        arrays = (getattr(self, item.name) for item in fields(self) if item.init)
        addresses = [array.__array_interface__["data"][0] for array in arrays]
        object.__setattr__(self, "addresses", np.array(addresses, np.uint64))

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def from_table(cls, table: pa.Table) -> GraphColumns:
        """The graph columns of a shard (or of a part of one); DataError if the lengths of their lists do not match."""
        num_atoms = _fixed(table, "num_atoms")
        num_conformers = _fixed(table, "num_conformers")
        conformer_atoms = num_atoms * num_conformers
        atom_features, _ = _ragged(table, "atom_features", np.uint8, NUM_ATOM_FEATURES, num_atoms)
        bonds, num_bonds = _ragged(table, "bonds", np.uint16, BOND_ENDS, None)
        bond_features, _ = _ragged(table, "bond_features", np.uint8, NUM_BOND_FEATURES, num_bonds)
        positions, _ = _ragged(table, "positions", np.float32, NUM_AXES, conformer_atoms)
        position_mask, _ = _ragged(table, "position_mask", np.bool_, 1, conformer_atoms)
        descriptors = undescribed(table.num_rows)
        if "descriptors" in table.column_names:
            once = np.ones(table.num_rows, np.int64)
            descriptors, _ = _ragged(table, "descriptors", np.float32, NUM_DESCRIPTORS, once)
        first_atom, first_bond, first_position = (
            np.cumsum(counts) - counts for counts in (num_atoms, num_bonds, conformer_atoms)
        )
        columns = {
            "num_atoms": num_atoms,
            "num_bonds": num_bonds,
            "num_conformers": num_conformers,
            "first_atom": first_atom,
            "first_bond": first_bond,
            "first_position": first_position,
        }
        return cls(
            rows=np.stack([columns[name] for name in ROW_FIELDS], axis=1),
            atom_features=atom_features,
            bonds=bonds,
            bond_features=bond_features,
            positions=positions,
            position_mask=position_mask.reshape(-1),
            descriptors=descriptors,
        )


ROW_FIELDS: Final = (
    "num_atoms",
    "num_bonds",
    "num_conformers",
    "first_atom",
    "first_bond",
    "first_position",
)
"""Columns of ``GraphColumns.rows``: counts of a molecule, and the rows of the flat arrays at which its atoms, its bonds
and the positions of its first conformer begin."""

# For the kernels: columns of `GraphColumns.rows`, and places of the arrays in `GraphColumns.addresses`.
_NUM_ATOMS: Final = ROW_FIELDS.index("num_atoms")
_NUM_BONDS: Final = ROW_FIELDS.index("num_bonds")
_NUM_CONFORMERS: Final = ROW_FIELDS.index("num_conformers")
_FIRST_ATOM: Final = ROW_FIELDS.index("first_atom")
_FIRST_BOND: Final = ROW_FIELDS.index("first_bond")
_FIRST_POSITION: Final = ROW_FIELDS.index("first_position")
_ROW_WIDTH: Final = len(ROW_FIELDS)
_ROW_BYTES: Final = _ROW_WIDTH * np.dtype(np.int64).itemsize
_ARRAYS: Final = tuple(item.name for item in fields(GraphColumns) if item.init)
_ROWS: Final = _ARRAYS.index("rows")
_ATOM_FEATURES: Final = _ARRAYS.index("atom_features")
_BONDS: Final = _ARRAYS.index("bonds")
_BOND_FEATURES: Final = _ARRAYS.index("bond_features")
_POSITIONS: Final = _ARRAYS.index("positions")
_POSITION_MASK: Final = _ARRAYS.index("position_mask")
_DESCRIPTORS: Final = _ARRAYS.index("descriptors")


def block_from_table(table: pa.Table, molecule_ids: NDArray[np.int64]) -> MoleculeBlock:
    """The rows of a shard (or of a part of one) as a block, with the first conformer of each molecule."""
    columns = GraphColumns.from_table(table)
    if len(molecule_ids) != len(columns):
        raise DataError(f"{len(molecule_ids)} molecule ids were given for {len(columns)} rows")
    rows = np.arange(len(columns), dtype=np.int64)
    return gather([columns], np.zeros_like(rows), rows, molecule_ids)


def gather(
    groups: Sequence[GraphColumns],
    group: NDArray[np.int64],
    row: NDArray[np.int64],
    molecule_ids: NDArray[np.int64],
    conformer: NDArray[np.int64] | None = None,
) -> MoleculeBlock:
    """The molecules at row ``row[i]`` of ``groups[group[i]]`` as one block of M molecules, in that order.

    ``conformer`` (M,) is a non-negative draw per molecule, which is taken modulo its number of conformers; None takes
    the first conformer. A molecule without conformers gets an all-False ``position_mask``. It is not checked that
    ``group`` and ``row`` are valid indices, and that all groups have descriptors or none has.
    """
    # The groups are in different places of memory: with their addresses, one call of a kernel reads from all of them.
    addresses = np.array([columns.addresses for columns in groups], np.uint64)
    addresses = addresses.reshape(-1, len(_ARRAYS))
    rows = np.empty((len(row), len(ROW_FIELDS)), np.int64)
    _gather_rows(addresses, group, row, rows)
    num_atoms, num_bonds = rows[:, _NUM_ATOMS], rows[:, _NUM_BONDS]
    atoms, bonds = num_atoms.sum(), num_bonds.sum()
    num_descriptors = groups[0].descriptors.shape[1] if groups else 0
    block = MoleculeBlock(
        molecule_ids=np.asarray(molecule_ids, dtype=np.int64),
        num_atoms=num_atoms.astype(np.int32),
        num_bonds=num_bonds.astype(np.int32),
        atom_features=np.empty((atoms, NUM_ATOM_FEATURES), np.uint8),
        bonds=np.empty((bonds, BOND_ENDS), np.uint16),
        bond_features=np.empty((bonds, NUM_BOND_FEATURES), np.uint8),
        positions=np.empty((atoms, NUM_AXES), np.float32),
        position_mask=np.empty(atoms, np.bool_),
        descriptors=np.empty((len(row), num_descriptors), np.float32),
    )
    _gather_values(
        addresses,
        group,
        row,
        rows,
        np.zeros(len(row), np.int64) if conformer is None else conformer,
        block.atom_features.reshape(-1),
        block.bonds.reshape(-1),
        block.bond_features.reshape(-1),
        block.positions.reshape(-1),
        block.position_mask,
        block.descriptors,
    )
    return block


def concatenate(blocks: Sequence[MoleculeBlock]) -> MoleculeBlock:
    """The molecules of all blocks, in the order of the blocks."""
    arrays = {
        item.name: np.concatenate([getattr(block, item.name) for block in blocks])
        for item in fields(MoleculeBlock)
    }
    return MoleculeBlock(**arrays)


def _type_pointer(_typing_context: Any, _address: Any) -> Any:
    """How Numba types and compiles ``_pointer``."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


# In kernels: turns an address (uint64) into a pointer for `carray`.
_pointer: Any = intrinsic(_type_pointer)


@kernel
def _gather_rows(addresses, group, row, rows):  # type: ignore[no-untyped-def]
    """Copy the row of ``GraphColumns.rows`` of each molecule."""
    for i in range(row.shape[0]):
        start = addresses[group[i], _ROWS] + np.uint64(_ROW_BYTES * row[i])
        found = carray(_pointer(start), _ROW_WIDTH, np.int64)
        for column in range(_ROW_WIDTH):
            rows[i, column] = found[column]


@kernel
def _gather_values(  # type: ignore[no-untyped-def]
    addresses,
    group,
    row,
    rows,
    draw,
    atom_features,
    bonds,
    bond_features,
    positions,
    position_mask,
    descriptors,
):
    """Copy the values of each molecule behind those of the one before; all destinations but the last are flat."""
    atom, bond = 0, 0
    for i in range(group.shape[0]):
        array = addresses[group[i]]
        n, num_bonds, conformers = (
            rows[i, _NUM_ATOMS],
            rows[i, _NUM_BONDS],
            rows[i, _NUM_CONFORMERS],
        )
        first_atom, first_bond = rows[i, _FIRST_ATOM], rows[i, _FIRST_BOND]
        _copy(atom_features, atom, array[_ATOM_FEATURES], first_atom, n, NUM_ATOM_FEATURES)
        _copy(bonds, bond, array[_BONDS], first_bond, num_bonds, BOND_ENDS)
        _copy(bond_features, bond, array[_BOND_FEATURES], first_bond, num_bonds, NUM_BOND_FEATURES)
        if conformers > 0:
            place = rows[i, _FIRST_POSITION] + draw[i] % conformers * n
            _copy(positions, atom, array[_POSITIONS], place, n, NUM_AXES)
            _copy(position_mask, atom, array[_POSITION_MASK], place, n, 1)
        else:
            positions[NUM_AXES * atom : NUM_AXES * (atom + n)] = 0
            position_mask[atom : atom + n] = False
        _copy(descriptors[i], 0, array[_DESCRIPTORS], row[i], 1, descriptors.shape[1])
        atom += n
        bond += num_bonds


@kernel
def _copy(target, begin, address, source_begin, num_rows, width):  # type: ignore[no-untyped-def]
    """Copy rows of ``width`` items to row ``begin`` of ``target``, from an array of its type at ``address``."""
    first = address + np.uint64(source_begin * width * target.itemsize)
    source = carray(_pointer(first), num_rows * width, target.dtype)
    for item in range(num_rows * width):
        target[begin * width + item] = source[item]


def undescribed(num_molecules: int) -> NDArray[np.float32]:
    """(M, 0), the descriptors of molecules that have none."""
    return np.empty((num_molecules, 0), np.float32)


def ragged_rows(counts: NDArray[np.int32], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers of the molecules ``indices`` in flat arrays with ``counts[i]`` rows for molecule i."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    taken = counts[indices].astype(np.int64)
    shift = starts[indices] - (np.cumsum(taken) - taken)
    return np.repeat(shift, taken) + np.arange(int(taken.sum()), dtype=np.int64)


def _column(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        raise DataError(f"a shard table lacks the column {name!r}; it has {table.column_names}")
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if array.null_count:
        raise DataError(
            f"column {name!r} of a shard has {array.null_count} nulls; it must have none"
        )
    return array


def _fixed(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(_column(table, name).to_numpy(zero_copy_only=False)).astype(np.int64)


def _ragged(
    table: pa.Table,
    name: str,
    dtype: type[np.generic],
    width: int,
    expected_rows: NDArray[np.int64] | None,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A column of lists as flat values (rows, ``width``), and the number of rows of each molecule; both checked."""
    array = _column(table, name)
    lengths = np.diff(array.offsets.to_numpy()).astype(np.int64)
    values = array.flatten()
    if values.null_count:
        raise DataError(f"lists of column {name!r} of a shard have nulls; they must have none")
    damaged = lengths % width != 0 if expected_rows is None else lengths != expected_rows * width
    if damaged.any():
        row = int(np.flatnonzero(damaged)[0])
        expected = (
            f"a multiple of {width}" if expected_rows is None else int(expected_rows[row]) * width
        )
        raise DataError(
            f"column {name!r} of a shard has {lengths[row]} values in row {row} of the table read, "
            f"expected {expected}; prepare the data again"
        )
    flat = np.asarray(values.to_numpy(zero_copy_only=False)).astype(dtype, copy=False)
    return flat.reshape(-1, width), lengths // width
