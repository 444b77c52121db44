"""Distances and rotations of the coordinates (angstrom) of a block of molecules."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.compilation import kernel
from moleblend_ray.errors import DataError
from moleblend_ray.relations.hashing import keyed_hash

_UNIT: Final = 2.0**-53


def closest_pair_distances(
    num_atoms: NDArray[np.int32], positions: NDArray[np.float32], position_mask: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(M,) float32, the smallest distance between two atoms with coordinates; inf if there are fewer than two.

    ``positions`` (A, 3) and ``position_mask`` (A,) are molecule after molecule. Pairs with a NaN are ignored.
    """
    _check_sizes(num_atoms, positions)
    closest = np.empty(len(num_atoms), np.float32)
    _closest_pairs(num_atoms, positions, position_mask, closest)
    return closest


def random_rotations(keys: NDArray[np.uint64]) -> NDArray[np.float32]:
    """(M, 3, 3) float32, one uniformly distributed rotation matrix per 64-bit key."""
    words = np.stack([keyed_hash(keys, word) for word in range(3)])
    u, v, w = (words >> np.uint64(11)).astype(np.float64) * _UNIT
    # Shoemake's uniform unit quaternions, scalar last.
    a, b = np.sqrt(1.0 - u), np.sqrt(u)
    x, y = a * np.sin(2 * np.pi * v), a * np.cos(2 * np.pi * v)
    z, s = b * np.sin(2 * np.pi * w), b * np.cos(2 * np.pi * w)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * s), 2 * (x * z + y * s)],
        [2 * (x * y + z * s), 1 - 2 * (x * x + z * z), 2 * (y * z - x * s)],
        [2 * (x * z - y * s), 2 * (y * z + x * s), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0).astype(np.float32)


def rotate(
    num_atoms: NDArray[np.int32], positions: NDArray[np.float32], rotations: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The positions (A, 3) of each molecule, rotated about the origin by its matrix in ``rotations`` (M, 3, 3)."""
    _check_sizes(num_atoms, positions)
    turned: NDArray[np.float32] = np.einsum(
        "aij,aj->ai", np.repeat(rotations, num_atoms, axis=0), positions
    )
    return turned


def _check_sizes(num_atoms: NDArray[np.int32], positions: NDArray[np.float32]) -> None:
    if positions.shape != (int(num_atoms.sum(dtype=np.int64)), 3):
        raise DataError(
            f"positions of shape {positions.shape} do not fit molecules with {int(num_atoms.sum())} atoms"
        )


@kernel
def _closest_pairs(num_atoms, positions, position_mask, closest):  # type: ignore[no-untyped-def]
    start = 0
    for molecule in range(num_atoms.shape[0]):
        end = start + num_atoms[molecule]
        least = np.inf
        for a in range(start, end):
            if not position_mask[a]:
                continue
            for b in range(a + 1, end):
                if position_mask[b]:
                    squared = 0.0
                    for axis in range(3):
                        difference = np.float64(positions[a, axis]) - np.float64(positions[b, axis])
                        squared += difference * difference
                    if squared < least:
                        least = squared
        closest[molecule] = np.sqrt(least)
        start = end
