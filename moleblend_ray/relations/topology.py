"""Shortest-path distances and bond codes along the path, for a whole block of molecules at a time.

The tie rule is the reference's: Floyd-Warshall over intermediate atoms k = 0, 1, ... with strict
improvement, the path recovered by splitting recursively at the stored k. The kernel below does not run
Floyd-Warshall (n^3) but reaches the same answer by one breadth-first search an atom:

* The stored k of a pair (a, b) is the smallest possible *largest interior atom* over all shortest paths
  from a to b: Floyd-Warshall reaches the final distance in the round that first admits all interior atoms
  of some shortest path. Over the predecessors p of b (one bond closer to a) it is therefore
  ``min(max(k(a, p), p))``, and -1 for bonded pairs.
* Every piece of a recovered path is itself the recovered path of its two ends: a better interior for the
  piece would give a better one for the whole. So ``path(a, b)`` is the first bond of ``path(a, k)``
  followed by ``path(c, b)``, with c the far end of that bond.

Distances above ``MAX_SPD`` (chains of more than 255 atoms) are stored as ``MAX_SPD``; paths stay exact.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moleblend_ray.errors import DataError
from moleblend_ray.vocabulary import BOND_VOCAB_SIZES, MAX_SPD, NUM_HOPS, UNREACHABLE

_NUM_TYPES, _NUM_STEREO, _NUM_CONJUGATED = (int(size) for size in BOND_VOCAB_SIZES)
_MAX_SPD: Final = int(MAX_SPD)
_UNREACHABLE: Final = int(UNREACHABLE)

BONDED: Final = -1
"""Intermediate atom of bonded pairs and of an atom with itself: there is none."""

DISCONNECTED: Final = -2
"""Intermediate atom of pairs in different fragments."""


class Topology(NamedTuple):
    """Graph relations of all ordered atom pairs; pair (a, b) of a molecule is row ``a * n + b`` of its part."""

    spd: NDArray[np.uint8]
    """(P,) uint8, bonds on the shortest path; 0 on the diagonal, ``UNREACHABLE`` between fragments."""

    path_codes: NDArray[np.uint8]
    """(P, num_hops) uint8, code of the h-th bond walking from a to b; ``NO_HOP`` past the end of the path."""


def num_pairs(num_atoms: NDArray[np.int32]) -> int:
    """Ordered atom pairs of molecules with these atom counts: the sum of squares."""
    counts = num_atoms.astype(np.int64)
    return int(counts @ counts)


def topology(
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    bonds: NDArray[np.uint16],
    bond_features: NDArray[np.uint8],
    num_hops: int = NUM_HOPS,
    out: Topology | None = None,
) -> Topology:
    """Distances and path codes of every ordered atom pair of M molecules.

    ``num_atoms`` and ``num_bonds`` are (M,), ``bonds`` (E, 2) atom indices within each molecule and
    ``bond_features`` (E, 3) OGB codes, all molecule-major. ``out`` gives the arrays to fill.
    """
    if out is None:
        pairs = num_pairs(num_atoms)
        out = Topology(np.empty(pairs, np.uint8), np.empty((pairs, num_hops), np.uint8))
    _check_sizes(num_atoms, num_bonds, bonds, bond_features)
    if out.spd.shape != (num_pairs(num_atoms),) or out.path_codes.shape[0] != out.spd.shape[0]:
        raise DataError(
            f"relation arrays of {out.spd.shape} and {out.path_codes.shape} do not hold "
            f"{num_pairs(num_atoms)} atom pairs"
        )
    damaged = _topology_kernel(num_atoms, num_bonds, bonds, bond_features, out.spd, out.path_codes)
    if damaged >= 0:
        raise _damaged_bonds(int(damaged), num_atoms, num_bonds, bonds, bond_features)
    return out


def intermediate_atoms(
    num_atoms: NDArray[np.int32], num_bonds: NDArray[np.int32], bonds: NDArray[np.uint16]
) -> NDArray[np.int32]:
    """The atom at which Floyd-Warshall splits each ordered pair, (P,) int32; else ``BONDED`` or ``DISCONNECTED``."""
    bond_features = np.zeros((len(bonds), 3), np.uint8)
    _check_sizes(num_atoms, num_bonds, bonds, bond_features)
    middle = np.empty(num_pairs(num_atoms), np.int32)
    damaged = _intermediate_kernel(num_atoms, num_bonds, bonds, bond_features, middle)
    if damaged >= 0:
        raise _damaged_bonds(int(damaged), num_atoms, num_bonds, bonds, bond_features)
    return middle


def bond_degrees(
    num_atoms: NDArray[np.int32], num_bonds: NDArray[np.int32], bonds: NDArray[np.uint16]
) -> NDArray[np.uint8]:
    """Neighbours of each atom in the kept graph, (A,) uint8, at most 255."""
    starts = np.cumsum(num_atoms, dtype=np.int64) - num_atoms
    ends = bonds.astype(np.int64) + np.repeat(starts, num_bonds)[:, None]
    counts = np.bincount(ends.ravel(), minlength=int(num_atoms.sum()))
    return np.minimum(counts, 255).astype(np.uint8)


def _check_sizes(
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    bonds: NDArray[np.uint16],
    bond_features: NDArray[np.uint8],
) -> None:
    total = int(num_bonds.sum())
    if (
        len(num_bonds) != len(num_atoms)
        or bonds.shape != (total, 2)
        or bond_features.shape != (total, 3)
    ):
        raise DataError(
            f"bond arrays do not fit: {len(num_atoms)} molecules, {len(num_bonds)} bond counts that sum to "
            f"{total}, bonds {bonds.shape}, bond features {bond_features.shape}"
        )
    if len(num_atoms) and (num_atoms.min() < 1 or num_bonds.min() < 0):
        raise DataError("a molecule has fewer than one atom or a negative number of bonds")


def _damaged_bonds(
    molecule: int,
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    bonds: NDArray[np.uint16],
    bond_features: NDArray[np.uint8],
) -> DataError:
    begin = int(num_bonds[:molecule].sum())
    own = slice(begin, begin + int(num_bonds[molecule]))
    return DataError(
        f"molecule {molecule} of the block has {num_atoms[molecule]} atoms but bonds up to atom "
        f"{bonds[own].max()} with feature codes up to {bond_features[own].max(axis=0).tolist()}; atoms must be "
        f"below the atom count and codes below {tuple(BOND_VOCAB_SIZES)}"
    )


@njit(cache=True, nogil=True)
def _neighbour_lists(n, begin, end, bonds, bond_features, starts, neighbours, codes):  # type: ignore[no-untyped-def]
    """Compressed neighbour lists of one molecule with the path code of each bond; False if a bond is damaged."""
    for atom in range(n + 1):
        starts[atom] = 0
    for e in range(begin, end):
        a, b = bonds[e, 0], bonds[e, 1]
        if (
            a >= n
            or b >= n
            or bond_features[e, 0] >= _NUM_TYPES
            or bond_features[e, 1] >= _NUM_STEREO
            or bond_features[e, 2] >= _NUM_CONJUGATED
        ):
            return False
        starts[a] += 1
        starts[b] += 1
    total = 0
    for atom in range(n + 1):
        total += starts[atom]
        starts[atom] = total
    for e in range(begin, end):
        a, b = bonds[e, 0], bonds[e, 1]
        code = (
            1
            + (bond_features[e, 0] * _NUM_STEREO + bond_features[e, 1]) * _NUM_CONJUGATED
            + bond_features[e, 2]
        )
        starts[a] -= 1
        neighbours[starts[a]] = b
        codes[starts[a]] = code
        starts[b] -= 1
        neighbours[starts[b]] = a
        codes[starts[b]] = code
    return True


@njit(cache=True, nogil=True)
def _search_from(source, n, starts, neighbours, distance, middle, queue):  # type: ignore[no-untyped-def]
    """Breadth-first search: distance and intermediate atom of every atom reached, in ``queue`` order."""
    for atom in range(n):
        distance[atom] = -1
        middle[atom] = DISCONNECTED
    distance[source] = 0
    middle[source] = BONDED
    queue[0] = source
    head, tail = 0, 1
    while head < tail:
        atom = queue[head]
        head += 1
        # The largest interior atom of a path that ends with the bond from `atom`.
        through = BONDED if atom == source else max(middle[atom], atom)
        for slot in range(starts[atom], starts[atom + 1]):
            other = neighbours[slot]
            if distance[other] < 0:
                distance[other] = distance[atom] + 1
                middle[other] = through
                queue[tail] = other
                tail += 1
            elif distance[other] == distance[atom] + 1 and through < middle[other]:
                middle[other] = through
    return tail


@njit(cache=True, nogil=True)
def _topology_kernel(num_atoms, num_bonds, bonds, bond_features, spd, path_codes):  # type: ignore[no-untyped-def]
    """Fill ``spd`` and ``path_codes``; the index of the first molecule with a damaged bond, or -1."""
    num_hops = path_codes.shape[1]
    widest, most_bonds = 0, 0
    for molecule in range(num_atoms.shape[0]):
        widest = max(widest, num_atoms[molecule])
        most_bonds = max(most_bonds, num_bonds[molecule])
    starts = np.empty(widest + 1, np.int32)
    neighbours = np.empty(2 * most_bonds, np.int32)
    codes = np.empty(2 * most_bonds, np.uint8)
    distance = np.empty(widest, np.int32)
    middle = np.empty(widest, np.int32)
    # Row a: the atoms in the order a's search reached them, the first atom of the path from a to each,
    # and that first bond's code.
    reached = np.empty(widest, np.int32)
    order = np.empty((widest, widest), np.int32)
    first_atom = np.empty((widest, widest), np.int32)
    first_code = np.empty((widest, widest), np.uint8)

    pair_start, bond_start = 0, 0
    for molecule in range(num_atoms.shape[0]):
        n = num_atoms[molecule]
        bond_end = bond_start + num_bonds[molecule]
        if not _neighbour_lists(
            n, bond_start, bond_end, bonds, bond_features, starts, neighbours, codes
        ):
            return molecule
        bond_start = bond_end
        for a in range(n):
            reached[a] = _search_from(a, n, starts, neighbours, distance, middle, order[a])
            row = pair_start + a * n
            for b in range(n):
                spd[row + b] = min(distance[b], _MAX_SPD) if distance[b] >= 0 else _UNREACHABLE
            for slot in range(starts[a], starts[a + 1]):
                b = neighbours[slot]
                first_atom[a, b] = b
                first_code[a, b] = codes[slot]
            for position in range(1, reached[a]):
                b = order[a, position]
                if middle[b] >= 0:
                    first_atom[a, b] = first_atom[a, middle[b]]
                    first_code[a, b] = first_code[a, middle[b]]
        path_codes[pair_start : pair_start + n * n] = 0
        for b in range(n):
            # Nearest to b first: what follows the first bond of a -> b is the finished path of a nearer atom.
            for position in range(1, reached[b]):
                a = order[b, position]
                pair = pair_start + a * n + b
                rest = pair_start + first_atom[a, b] * n + b
                path_codes[pair, 0] = first_code[a, b]
                for hop in range(1, num_hops):
                    path_codes[pair, hop] = path_codes[rest, hop - 1]
        pair_start += n * n
    return -1


@njit(cache=True, nogil=True)
def _intermediate_kernel(num_atoms, num_bonds, bonds, bond_features, middle):  # type: ignore[no-untyped-def]
    """Fill ``middle`` with the intermediate atom of each pair; first damaged molecule, or -1."""
    pair_start, bond_start = 0, 0
    for molecule in range(num_atoms.shape[0]):
        n = num_atoms[molecule]
        bond_end = bond_start + num_bonds[molecule]
        starts = np.empty(n + 1, np.int32)
        neighbours = np.empty(2 * num_bonds[molecule], np.int32)
        codes = np.empty(2 * num_bonds[molecule], np.uint8)
        distance = np.empty(n, np.int32)
        queue = np.empty(n, np.int32)
        if not _neighbour_lists(
            n, bond_start, bond_end, bonds, bond_features, starts, neighbours, codes
        ):
            return molecule
        bond_start = bond_end
        for a in range(n):
            row = middle[pair_start + a * n : pair_start + (a + 1) * n]
            _search_from(a, n, starts, neighbours, distance, row, queue)
        pair_start += n * n
    return -1
