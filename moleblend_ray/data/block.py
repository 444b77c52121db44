"""A block of molecules as flat arrays: what the relation kernels and the batch packer work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.errors import DataError
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES

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


def ragged_rows(counts: NDArray[np.int32], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row numbers, in flat arrays with ``counts[i]`` rows for molecule i, of the molecules ``indices``."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    taken = counts[indices].astype(np.int64)
    shift = starts[indices] - (np.cumsum(taken) - taken)
    return np.repeat(shift, taken) + np.arange(int(taken.sum()), dtype=np.int64)


def block_from_table(
    table: pa.Table,
    molecule_ids: NDArray[np.int64],
    conformer: NDArray[np.int64] | None = None,
) -> MoleculeBlock:
    """The rows of a shard table (or of a part of one) as a block.

    ``conformer`` (M,) is a non-negative draw for each molecule, taken modulo its number of conformers;
    None takes the first conformer. A molecule without conformers gets an all-False ``position_mask``.
    """
    num_atoms = _fixed(table, "num_atoms", np.int32)
    if len(molecule_ids) != len(num_atoms):
        raise DataError(f"{len(molecule_ids)} molecule ids were given for {len(num_atoms)} rows")
    conformers = _fixed(table, "num_conformers", np.int64)
    atoms = num_atoms.astype(np.int64)
    atom_features, _ = _ragged(table, "atom_features", np.uint8, NUM_ATOM_FEATURES, atoms)
    bonds, num_bonds = _ragged(table, "bonds", np.uint16, 2, None)
    bond_features, _ = _ragged(
        table, "bond_features", np.uint8, NUM_BOND_FEATURES, num_bonds.astype(np.int64)
    )
    positions, _ = _ragged(table, "positions", np.float32, 3, atoms * conformers)
    position_mask, _ = _ragged(table, "position_mask", np.bool_, 1, atoms * conformers)
    positions, position_mask = _choose_conformer(
        positions, position_mask.reshape(-1), atoms, conformers, conformer
    )
    return MoleculeBlock(
        molecule_ids=np.asarray(molecule_ids, dtype=np.int64),
        num_atoms=num_atoms,
        num_bonds=num_bonds,
        atom_features=atom_features,
        bonds=bonds,
        bond_features=bond_features,
        positions=positions,
        position_mask=position_mask,
    )


def _choose_conformer(
    positions: NDArray[np.float32],
    position_mask: NDArray[np.bool_],
    num_atoms: NDArray[np.int64],
    conformers: NDArray[np.int64],
    draw: NDArray[np.int64] | None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if (conformers == 1).all():
        return positions, position_mask
    total = int(num_atoms.sum())
    chosen_positions = np.zeros((total, 3), np.float32)
    chosen_mask = np.zeros(total, np.bool_)
    choice = np.zeros_like(conformers) if draw is None else draw % np.maximum(conformers, 1)
    rows_each = num_atoms * conformers
    starts = np.cumsum(rows_each) - rows_each + choice * num_atoms
    target = np.repeat(conformers > 0, num_atoms)
    offsets = np.arange(total) - np.repeat(np.cumsum(num_atoms) - num_atoms, num_atoms)
    source = (np.repeat(starts, num_atoms) + offsets)[target]
    chosen_positions[target] = positions[source]
    chosen_mask[target] = position_mask[source]
    return chosen_positions, chosen_mask


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


def _fixed(table: pa.Table, name: str, dtype: type[np.generic]) -> NDArray[Any]:
    return np.asarray(_column(table, name).to_numpy(zero_copy_only=False)).astype(dtype)


def _ragged(
    table: pa.Table,
    name: str,
    dtype: type[np.generic],
    width: int,
    expected_rows: NDArray[np.int64] | None,
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """A list column as flat ``(rows, width)`` values and the rows of each molecule, checked."""
    array = _column(table, name)
    lengths = np.diff(array.offsets.to_numpy())
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
    return flat.reshape(-1, width), (lengths // width).astype(np.int32)
