"""What each atom adds to a prediction: that of the whole molecule minus that of the molecule without the atom.

This colours atoms according to changes in predicted activity, as it is usual for models of fingerprints (Riniker and Landrum, J.
Cheminform. 5, 43 (2013); Sheridan, J. Chem. Inf. Model. 59, 1324 (2019)), but without new chemistry: no bond is cut and no hydrogen
is added. The model sees all other atoms with the relations that they have in the whole molecule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moleblend_ray.evaluation.models.batches import batches_by_size
from moleblend_ray.evaluation.prediction.ensemble import combine
from moleblend_ray.model.batch import MoleculeBatch

Ask = Callable[[NDArray[np.int64], MoleculeBatch], NDArray[np.float64]]
"""(B,) views, and the batch that shows them or what is left of them, -> (S, B, T) outputs of S models for T properties."""

_SLICE: Final = 256
"""Molecules whose contributions are in memory for all models and conformers at once."""


class Contributions(NamedTuple):
    """Of the A atoms of M molecules, one molecule after the other, to T properties; in the unit, of classes in log-odds."""

    mean: NDArray[np.float32]
    """(A, T) mean over models and conformers; NaN for the atom of a molecule that has no other."""
    std: NDArray[np.float32]
    """(A, T) sample standard deviation (n - 1) over models, of means over conformers; NaN with one model as well."""
    num_atoms: NDArray[np.int64]
    """(M,)"""

    def lists(self, values: NDArray[np.float32]) -> list[pa.Array]:
        """For each property M lists of ``values`` (A, T): the atoms of a molecule, or null where these are NaN."""
        ends = np.cumsum(self.num_atoms)
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        unknown = np.isnan(values[ends - 1])
        return [
            pa.ListArray.from_arrays(
                offsets, np.ascontiguousarray(column), mask=pa.array(unknown[:, place])
            )
            for place, column in enumerate(values.T)
        ]


def atom_contributions(
    table: pa.Table,
    views: NDArray[np.int64],
    ask: Ask,
    *,
    shape: tuple[int, int],
    batch_size: int,
    device: torch.device,
) -> Contributions:
    """Contributions of the atoms of a shard table, in their order there, from ``views`` (M,) conformers of each molecule.

    ``shape``: S models and T properties. Asks for as many predictions as there are atoms, and as many more as there are molecules.
    """
    num_atoms = table["num_atoms"].to_numpy().astype(np.int64)
    mean, std = (np.empty((num_atoms.sum(), shape[1]), np.float32) for _ in range(2))
    atom = view = 0
    for begin in range(0, len(table), _SLICE):
        some = slice(begin, begin + _SLICE)
        sizes = _Sizes(num_atoms[some], views[some])
        differences = np.full((shape[0], sizes.num_slots, shape[1]), np.nan)
        for rows, batch in batches_by_size(
            table.slice(begin, _SLICE), sizes.views, batch_size, device
        ):
            _compare(ask, batch, rows, view, sizes, batch_size, differences)
        combined = combine(differences, np.repeat(sizes.views, sizes.num_atoms))
        atoms = slice(atom, atom + len(combined.mean))
        mean[atoms], std[atoms] = combined.mean, combined.std
        atom, view = atoms.stop, view + int(sizes.views.sum())
    return Contributions(mean, std, num_atoms)


class _Sizes:
    """Where the differences of each view (conformer) of some molecules belong: molecule by molecule, atom by atom, view by view."""

    def __init__(self, num_atoms: NDArray[np.int64], views: NDArray[np.int64]) -> None:
        """Both (M,)."""
        self.num_atoms, self.views = num_atoms, views
        self.num_slots = int((num_atoms * views).sum())
        molecule = np.repeat(np.arange(len(views)), views)
        first_slot = np.cumsum(num_atoms * views) - num_atoms * views
        first_view = np.cumsum(views) - views
        self.atoms_of_view = num_atoms[molecule]
        """(R,) atoms of each view."""
        self.stride = views[molecule]
        """(R,) slots from one atom of a view to the next one."""
        self.first_slot = np.arange(len(molecule)) + (first_slot - first_view)[molecule]
        """(R,) slot of the first atom of each view."""


def _compare(
    ask: Ask,
    batch: MoleculeBatch,
    rows: NDArray[np.int64],
    first_view: int,
    sizes: _Sizes,
    batch_size: int,
    differences: NDArray[np.float64],
) -> None:
    """Write to ``differences`` (S, slots, T) what the outputs of the views ``rows`` (B,) lose without each of their atoms.

    Those of molecules of one atom stay as they are. ``first_view`` is the number of views before these molecules.
    """
    whole = ask(first_view + rows, batch)
    num_atoms = sizes.atoms_of_view[rows]
    num_atoms = np.where(num_atoms > 1, num_atoms, 0)
    place = np.repeat(np.arange(len(rows)), num_atoms)
    atom = np.arange(len(place)) - np.repeat(np.cumsum(num_atoms) - num_atoms, num_atoms)
    slot = sizes.first_slot[rows][place] + atom * sizes.stride[rows][place]
    for begin in range(0, len(place), batch_size):
        some = slice(begin, begin + batch_size)
        left = batch.without_atom(torch.from_numpy(place[some]), torch.from_numpy(atom[some]))
        differences[:, slot[some]] = whole[:, place[some]] - ask(
            first_view + rows[place[some]], left
        )
