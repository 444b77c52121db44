"""What each atom of a molecule adds to a property, independent of its bonds: a linear fit of element counts.

Total energies are nearly such a sum (as are heat capacities and polarizabilities), and a model should spend its
accuracy on the rest. The fit uses the training part only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.model.moleblend import HYDROGEN, NUM_ELEMENTS, NUM_HYDROGENS_COLUMN


def element_counts(block: MoleculeBlock) -> NDArray[np.float64]:
    """(M, 119) number of atoms of each element code, including implicit hydrogens."""
    molecule = np.repeat(np.arange(len(block)), block.num_atoms)
    counts = np.zeros((len(block), NUM_ELEMENTS))
    np.add.at(counts, (molecule, block.atom_features[:, 0]), 1.0)
    np.add.at(counts[:, HYDROGEN], molecule, block.atom_features[:, NUM_HYDROGENS_COLUMN])
    return counts


def fit_reference(counts: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(119, T): what an atom of each element adds to (M, T) ``labels``, by least squares with a constant.

    Missing labels are left out. An element that no molecule with a label of the column has adds exactly 0 there, by which it is
    known later, and so do all elements where these labels are equal. For elements that these molecules cannot tell apart from
    others, the solution of least norm is taken.
    """
    reference = np.zeros((counts.shape[1], labels.shape[1]))
    for column, values in enumerate(labels.T):
        known = ~np.isnan(values)
        # Of equal labels, a fit would leave nothing but rounding, which would become the scale of the column.
        if not known.any() or values[known].min() == values[known].max():
            continue
        used = np.flatnonzero(counts[known].any(axis=0))
        design = np.concatenate([counts[known][:, used], np.ones((known.sum(), 1))], axis=1)
        solution, *_ = np.linalg.lstsq(design, values[known], rcond=None)
        reference[used, column] = solution[:-1]
    return reference
