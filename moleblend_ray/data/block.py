"""A block of molecules as flat arrays: what the relation kernels and the batch packer work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from moleblend_ray.errors import DataError
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES

if TYPE_CHECKING:  # benchmarks of the model need no pyarrow
    import pyarrow as pa

NUM_ATOM_FEATURES: Final = len(ATOM_VOCAB_SIZES)
NUM_BOND_FEATURES: Final = len(BOND_VOCAB_SIZES)


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
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphColumns:
    """The graph columns of R shard rows, checked, as flat arrays that view the table's memory where they can."""

    rows: NDArray[np.int64]
    """(R, 6) int64: num_atoms, num_bonds, num_conformers, and where in the arrays below the molecule's atoms,
    its bonds and the atoms of its first conformer begin. One row is less than a cache line."""

    atom_features: NDArray[np.uint8]
    """(A, 9) uint8."""

    bonds: NDArray[np.uint16]
    """(E, 2) uint16."""

    bond_features: NDArray[np.uint8]
    """(E, 3) uint8."""

    positions: NDArray[np.float32]
    """(C, 3) float32, conformer by conformer of each molecule."""

    position_mask: NDArray[np.bool_]
    """(C,) bool."""

    addresses: NDArray[np.uint64] = field(init=False, repr=False)
    """(6,) uint64, where in memory each of the arrays above begins."""

    def __post_init__(self) -> None:
        """Note the addresses: a kernel that reads from many of these gets them in one array."""
        arrays = (getattr(self, item.name) for item in fields(self) if item.init)
        addresses = [array.__array_interface__["data"][0] for array in arrays]
        object.__setattr__(self, "addresses", np.array(addresses, np.uint64))

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def from_table(cls, table: pa.Table) -> GraphColumns:
        """The graph columns of a shard table (or of a part of one); DataError if their lists do not fit."""
        num_atoms = _fixed(table, "num_atoms")
        num_conformers = _fixed(table, "num_conformers")
        conformer_atoms = num_atoms * num_conformers
        atom_features, _ = _ragged(table, "atom_features", np.uint8, NUM_ATOM_FEATURES, num_atoms)
        bonds, num_bonds = _ragged(table, "bonds", np.uint16, 2, None)
        bond_features, _ = _ragged(table, "bond_features", np.uint8, NUM_BOND_FEATURES, num_bonds)
        positions, _ = _ragged(table, "positions", np.float32, 3, conformer_atoms)
        position_mask, _ = _ragged(table, "position_mask", np.bool_, 1, conformer_atoms)
        starts = (np.cumsum(n) - n for n in (num_atoms, num_bonds, conformer_atoms))
        return cls(
            rows=np.stack([num_atoms, num_bonds, num_conformers, *starts], axis=1),
            atom_features=atom_features,
            bonds=bonds,
            bond_features=bond_features,
            positions=positions,
            position_mask=position_mask.reshape(-1),
        )


def block_from_table(
    table: pa.Table,
    molecule_ids: NDArray[np.int64],
    conformer: NDArray[np.int64] | None = None,
) -> MoleculeBlock:
    """The rows of a shard table (or of a part of one) as a block; ``conformer`` as :func:`gather` says."""
    columns = GraphColumns.from_table(table)
    if len(molecule_ids) != len(columns):
        raise DataError(f"{len(molecule_ids)} molecule ids were given for {len(columns)} rows")
    rows = np.arange(len(columns), dtype=np.int64)
    return gather([columns], np.zeros_like(rows), rows, molecule_ids, conformer)


def gather(
    groups: Sequence[GraphColumns],
    group: NDArray[np.int64],
    row: NDArray[np.int64],
    molecule_ids: NDArray[np.int64],
    conformer: NDArray[np.int64] | None = None,
) -> MoleculeBlock:
    """The molecules at row ``row[i]`` of ``groups[group[i]]`` as one block of M molecules, in that order.

    ``conformer`` (M,) is a non-negative draw for each molecule, taken modulo its number of conformers;
    None takes the first conformer. A molecule without conformers gets an all-False ``position_mask``.
    ``group`` and ``row`` must lie within the groups: this is not checked.
    """
    # Each group lies where it was decoded: given addresses, one call of a kernel reads from all of them.
    addresses = np.array([columns.addresses for columns in groups], np.uint64).reshape(-1, 6)
    sizes = np.empty((len(row), 6), np.int64)
    _gather_rows(addresses, group, row, sizes)
    atoms, bonds = sizes[:, 0].sum(), sizes[:, 1].sum()
    block = MoleculeBlock(
        molecule_ids=np.asarray(molecule_ids, dtype=np.int64),
        num_atoms=sizes[:, 0].astype(np.int32),
        num_bonds=sizes[:, 1].astype(np.int32),
        atom_features=np.empty((atoms, NUM_ATOM_FEATURES), np.uint8),
        bonds=np.empty((bonds, 2), np.uint16),
        bond_features=np.empty((bonds, NUM_BOND_FEATURES), np.uint8),
        positions=np.empty((atoms, 3), np.float32),
        position_mask=np.empty(atoms, np.bool_),
    )
    _gather_values(
        addresses,
        group,
        sizes,
        np.zeros(len(row), np.int64) if conformer is None else conformer,
        block.atom_features.reshape(-1),
        block.bonds.reshape(-1),
        block.bond_features.reshape(-1),
        block.positions.reshape(-1),
        block.position_mask,
    )
    return block


def concatenate(blocks: Sequence[MoleculeBlock]) -> MoleculeBlock:
    """The molecules of all blocks, one block after the other."""
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


# In kernels: an address (uint64) as a pointer for `carray`.
_pointer: Any = intrinsic(_type_pointer)


@njit(cache=True, nogil=True)
def _gather_rows(addresses, group, row, sizes):  # type: ignore[no-untyped-def]
    """``GraphColumns.rows`` of each molecule."""
    for i in range(row.shape[0]):
        start = addresses[group[i], 0] + np.uint64(48 * row[i])
        found = carray(_pointer(start), 6, np.int64)
        for column in range(6):
            sizes[i, column] = found[column]


@njit(cache=True, nogil=True)
def _gather_values(  # type: ignore[no-untyped-def]
    addresses, group, sizes, draw, atom_features, bonds, bond_features, positions, position_mask
):
    """Copy each molecule's values behind those of the one before; all destinations are flat."""
    atom, bond = 0, 0
    for i in range(group.shape[0]):
        n, num_bonds, conformers = sizes[i, 0], sizes[i, 1], sizes[i, 2]
        place = addresses[group[i]]
        _copy(atom_features, 9 * atom, place[1], 9 * sizes[i, 3], 9 * n)
        _copy(bonds, 2 * bond, place[2], 2 * sizes[i, 4], 2 * num_bonds)
        _copy(bond_features, 3 * bond, place[3], 3 * sizes[i, 4], 3 * num_bonds)
        if conformers > 0:
            start = sizes[i, 5] + draw[i] % conformers * n
            _copy(positions, 3 * atom, place[4], 3 * start, 3 * n)
            _copy(position_mask, atom, place[5], start, n)
        else:
            positions[3 * atom : 3 * (atom + n)] = 0
            position_mask[atom : atom + n] = False
        atom += n
        bond += num_bonds


@njit(cache=True, nogil=True)
def _copy(target, begin, address, source_begin, count):  # type: ignore[no-untyped-def]
    """``count`` items from the array at ``address``, whose items are like the target's."""
    first = address + np.uint64(source_begin * target.itemsize)
    source = carray(_pointer(first), count, target.dtype)
    for item in range(count):
        target[begin + item] = source[item]


def ragged_rows(counts: NDArray[np.int32], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers, in flat arrays with ``counts[i]`` rows for molecule i, of the molecules ``indices``."""
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
    """A list column as flat ``(rows, width)`` values and the rows of each molecule, checked."""
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
