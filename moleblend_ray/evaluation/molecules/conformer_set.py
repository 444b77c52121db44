"""Several conformers per molecule of a task. Training draws one per epoch; predictions are averaged over all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data.dataset.block import GraphColumns, MoleculeBlock, gather, ragged_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformerSet:
    """Coordinates of up to K conformers of M molecules with A atoms in total, molecule-major, lowest energy first."""

    positions: NDArray[np.float32]
    """(K, A, 3) angstrom; if a molecule has fewer than K conformers, they are repeated."""
    position_mask: NDArray[np.bool_]
    """(K, A), True where the atom has coordinates."""
    counts: NDArray[np.int64]
    """(M,) number of conformers per molecule, 1 to K; also 1 for a molecule without coordinates."""

    @classmethod
    def of(cls, table: pa.Table, most: int) -> ConformerSet:
        """The first ``most`` conformers of each row of a shard table."""
        columns = GraphColumns.from_table(table)
        rows = np.arange(len(columns), dtype=np.int64)
        blocks = [
            gather([columns], np.zeros_like(rows), rows, rows, np.full_like(rows, number))
            for number in range(most)
        ]
        return cls(
            positions=np.stack([block.positions for block in blocks]),
            position_mask=np.stack([block.position_mask for block in blocks]),
            counts=np.clip(columns.rows[:, 2], 1, most),
        )

    def take(self, num_atoms: NDArray[np.int32], indices: NDArray[np.int64]) -> ConformerSet:
        """The conformers of the molecules at ``indices``; ``num_atoms`` (M,) is for all molecules."""
        atoms = ragged_rows(num_atoms, indices)
        return ConformerSet(
            positions=self.positions[:, atoms],
            position_mask=self.position_mask[:, atoms],
            counts=self.counts[indices],
        )

    def pose(
        self, block: MoleculeBlock, indices: NDArray[np.int64], numbers: NDArray[np.int64]
    ) -> MoleculeBlock:
        """The molecules of ``block`` (all M) at ``indices`` (K,), each with the conformer of the given number (K,)."""
        atoms = ragged_rows(block.num_atoms, indices)
        taken = np.repeat(numbers, block.num_atoms[indices])
        return dataclasses.replace(
            block.take(indices),
            positions=self.positions[taken, atoms],
            position_mask=self.position_mask[taken, atoms],
        )
