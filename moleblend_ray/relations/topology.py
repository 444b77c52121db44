"""Shortest-path distances and bond codes along the paths, for all atom pairs of molecules.

From Python, :func:`topology` computes them for a block of molecules. The kernel that packs micro-batches calls
:func:`relate_molecule` molecule by molecule.

Ties are broken as in the official code: Floyd-Warshall over intermediate atoms k = 0, 1, ... with strict improvement;
the path is recovered by splitting recursively at the stored k. The kernel below is this algorithm without the work that
cannot change the result. It adds the atoms v = 0, 1, ... one after the other. Once v is added, its tables hold what
Floyd-Warshall holds after round v for all pairs of atoms up to v:

* A path to v whose interior atoms are all below v ends with a bond from an earlier neighbour p of v. Its length is
  ``d(a, p) + 1`` and its largest interior atom ``max(k(a, p), p)``. Floyd-Warshall stores the smallest possible
  *largest interior atom* over all shortest paths, because it reaches the final distance in the round that first admits
  all interior atoms of some shortest path. So the row of v is the smallest (length, largest interior atom) over the
  earlier neighbours p.
* Round v only changes pairs of earlier atoms whose path goes through two neighbours of v. An atom with one earlier
  neighbour needs no round: in a molecule, only atoms that close a ring or join two parts need one.
* Every piece of a recovered path is itself the recovered path between its ends: a better interior of the piece would
  give a better interior of the whole path. So a path can be composed from the words of its pieces, and the last atom
  before v on the path from a is found by splitting (a, v) at k, then (k, v), until a bond is left.

A tree takes O(n^2) steps, and each ring closure O(n^2) more. For molecules in the order of a SMILES this is a few steps
per pair, all on rows that stay in the first-level cache.

Distances above ``MAX_SPD`` (chains of more than 255 atoms) are stored as ``MAX_SPD``; their paths stay exact.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.compilation import kernel
from moleblend_ray.errors import DataError
from moleblend_ray.vocabulary import (
    BOND_VOCAB_SIZES,
    MAX_SPD,
    NUM_BOND_CODES,
    NUM_HOPS,
    UNREACHABLE,
)

HOP_BITS: Final = 6
"""Bits per bond code in a path word; the first hop is in the lowest bits."""

HOP_MASK: Final = (1 << HOP_BITS) - 1
"""Mask of the first hop of a path word."""

if NUM_BOND_CODES > HOP_MASK + 1 or HOP_BITS * NUM_HOPS > 30:
    raise RuntimeError("the bond codes of a path do not fit in 30 bits of its word")

_NUM_TYPES, _NUM_STEREO, _NUM_CONJUGATED = (int(size) for size in BOND_VOCAB_SIZES)
_MAX_SPD: Final = np.int32(MAX_SPD)
_UNREACHABLE: Final = np.int32(UNREACHABLE)
_HOP_BITS: Final = np.uint32(HOP_BITS)
_NUM_HOPS: Final = np.int32(NUM_HOPS)
_WORD_MASK: Final = np.uint32((1 << (HOP_BITS * NUM_HOPS)) - 1)
# Larger than every distance (atom indices are uint16), and the sum of two still fits an int32.
_FAR: Final = np.int32(1 << 20)


class Topology(NamedTuple):
    """Graph relations of the P ordered atom pairs of a block; pair (a, b) of a molecule is its row ``a * n + b``."""

    spd: NDArray[np.uint8]
    """(P,) uint8, bonds on the shortest path; 0 on the diagonal, ``UNREACHABLE`` between fragments."""

    path_words: NDArray[np.uint32]
    """(P,) uint32, codes of the first ``NUM_HOPS`` bonds from a to b, ``HOP_BITS`` bits each."""

    @property
    def path_codes(self) -> NDArray[np.uint8]:
        """(P, NUM_HOPS) uint8, code of the h-th bond from a to b; ``NO_HOP`` past the end of the path."""
        return unpack_path_words(self.path_words)


class Workspace(NamedTuple):
    """Scratch memory of the kernel for molecules of up to n atoms and E bonds."""

    starts: NDArray[np.uint32]
    """(n + 1,), where in the next two arrays the bonds of each atom to earlier atoms begin."""
    earlier: NDArray[np.uint32]
    """(E,), the earlier atom of each bond."""
    codes: NDArray[np.uint32]
    """(E,), the code of each bond."""
    distance: NDArray[np.int32]
    """(n, n), bonds on the shortest path so far; ``_FAR`` if there is none."""
    middle: NDArray[np.int32]
    """(n, n), one plus the largest interior atom of that path; 0 if it has no interior."""


def num_pairs(num_atoms: NDArray[np.int32]) -> int:
    """The number of ordered atom pairs of molecules with these atom counts: the sum of squares."""
    counts = num_atoms.astype(np.int64)
    return int(counts @ counts)


def unpack_path_words(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Path words (P,) as bond codes (P, NUM_HOPS) uint8."""
    shifts = np.arange(0, HOP_BITS * NUM_HOPS, HOP_BITS, dtype=np.uint32)
    return (words[:, None] >> shifts & np.uint32(HOP_MASK)).astype(np.uint8)


def workspace(num_atoms: NDArray[np.int32], num_bonds: NDArray[np.int32]) -> Workspace:
    """Scratch memory that is large enough for each of these molecules."""
    n, bonds = int(num_atoms.max(initial=0)), int(num_bonds.max(initial=0))
    return Workspace(
        starts=np.empty(n + 1, np.uint32),
        earlier=np.empty(bonds, np.uint32),
        codes=np.empty(bonds, np.uint32),
        distance=np.empty((n, n), np.int32),
        middle=np.empty((n, n), np.int32),
    )


def topology(
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    bonds: NDArray[np.uint16],
    bond_features: NDArray[np.uint8],
) -> Topology:
    """Distances and paths of every ordered atom pair of M molecules.

    ``num_atoms`` and ``num_bonds`` are (M,), ``bonds`` (E, 2) atom indices within each molecule, and ``bond_features``
    (E, 3) OGB codes, all molecule after molecule. A ``DataError`` names the molecule of an impossible bond: an atom or
    a code is out of range, an atom is bonded to itself, or two atoms have two bonds.
    """
    check_bond_arrays(num_atoms, num_bonds, bonds, bond_features)
    pairs = num_pairs(num_atoms)
    found = Topology(np.empty(pairs, np.uint8), np.empty(pairs, np.uint32))
    space = workspace(num_atoms, num_bonds)
    damaged = _block_kernel(num_atoms, num_bonds, bonds, bond_features, *found, space)
    if damaged >= 0:
        raise damaged_bonds(int(damaged), num_atoms, num_bonds, bonds, bond_features)
    return found


def check_bond_arrays(
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    bonds: NDArray[np.uint16],
    bond_features: NDArray[np.uint8],
) -> None:
    """DataError if the arrays do not match; the kernels rely on their shapes."""
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


def damaged_bonds(
    molecule: int,
    num_atoms: NDArray[np.int32],
    num_bonds: NDArray[np.int32],
    bonds: NDArray[np.uint16],
    bond_features: NDArray[np.uint8],
) -> DataError:
    """The error for the molecule at which a kernel stopped."""
    begin = int(num_bonds[:molecule].sum())
    own = slice(begin, begin + int(num_bonds[molecule]))
    return DataError(
        f"molecule {molecule} of the block has {num_atoms[molecule]} atoms but bonds up to atom "
        f"{bonds[own].max()} with feature codes up to {bond_features[own].max(axis=0).tolist()}; atoms must be "
        f"below the atom count, codes below {tuple(BOND_VOCAB_SIZES)}, and each bond must stand once and join two "
        f"atoms (bonds: {bonds[own].tolist()})"
    )


@kernel
def _block_kernel(num_atoms, num_bonds, bonds, bond_features, spd, path_words, space):  # type: ignore[no-untyped-def]
    """Fill ``spd`` and ``path_words``; returns the index of the first molecule with a damaged bond, or -1."""
    pair, bond = 0, 0
    for molecule in range(num_atoms.shape[0]):
        n, bond_end = num_atoms[molecule], bond + num_bonds[molecule]
        pair_end = pair + n * n
        if not relate_molecule(
            n,
            bonds[bond:bond_end],
            bond_features[bond:bond_end],
            spd[pair:pair_end],
            path_words[pair:pair_end],
            space,
        ):
            return molecule
        pair, bond = pair_end, bond_end
    return -1


@kernel
def relate_molecule(n, bonds, bond_features, spd, path_words, space):  # type: ignore[no-untyped-def]
    """Fill ``spd`` (n * n,) and ``path_words`` (n * n,) of one molecule; False if a bond is damaged.

    To be called by other kernels: arrays are not checked, and ``space`` must be large enough.
    """
    starts, distance, middle = space.starts, space.distance, space.middle
    if not _bonds_to_earlier(n, bonds, bond_features, starts, space.earlier, space.codes):
        return False
    words = path_words.reshape((n, n))
    for v in range(n):
        distance[v, v] = 0
        middle[v, v] = 0
        words[v, v] = 0
        first, end = starts[v], starts[v + 1]
        if end - first == 1:
            _add_leaf(v, space.earlier[first], space.codes[first], distance, middle, words)
        elif end == first:
            for a in range(v):
                _set_far(v, a, distance, middle, words)
        else:
            earlier, codes = space.earlier[first:end], space.codes[first:end]
            if not _add_rows(v, earlier, distance, middle):
                return False
            _add_words(v, earlier, codes, distance, middle, words)
            _round(v, distance, middle, words)
    for a in range(n):
        for b in range(n):
            d = distance[a, b]
            spd[a * n + b] = _UNREACHABLE if d >= _FAR else min(d, _MAX_SPD)
    return True


@kernel
def _bonds_to_earlier(n, bonds, bond_features, starts, earlier, codes):  # type: ignore[no-untyped-def]
    """Each atom's bonds to earlier atoms, in compressed form; False if an atom or a code of a bond is impossible."""
    for atom in range(n + 1):
        starts[atom] = 0
    for e in range(bonds.shape[0]):
        a, b = bonds[e, 0], bonds[e, 1]
        if (
            a >= n
            or b >= n
            or a == b
            or bond_features[e, 0] >= _NUM_TYPES
            or bond_features[e, 1] >= _NUM_STEREO
            or bond_features[e, 2] >= _NUM_CONJUGATED
        ):
            return False
        starts[max(a, b)] += np.uint32(1)
    total = np.uint32(0)
    for atom in range(n + 1):
        total += starts[atom]
        starts[atom] = total
    for e in range(bonds.shape[0]):
        a, b = bonds[e, 0], bonds[e, 1]
        later = max(a, b)
        slot = starts[later] - np.uint32(1)
        starts[later] = slot
        earlier[slot] = min(a, b)
        kind = bond_features[e, 0] * _NUM_STEREO + bond_features[e, 1]
        codes[slot] = 1 + kind * _NUM_CONJUGATED + bond_features[e, 2]
    return True


@kernel
def _joined(first, second, hops):  # type: ignore[no-untyped-def]
    """The word of a path of ``hops`` bonds with word ``first``, followed by a path with word ``second``."""
    # After NUM_HOPS bonds, the second word is shifted out.
    return (first | (second << (_HOP_BITS * np.uint32(min(hops, _NUM_HOPS))))) & _WORD_MASK


@kernel
def _set_far(v, a, distance, middle, words):  # type: ignore[no-untyped-def]
    """Mark atoms v and a as disconnected so far."""
    distance[v, a] = distance[a, v] = _FAR
    middle[v, a] = middle[a, v] = 0
    words[v, a] = words[a, v] = 0


@kernel
def _add_leaf(v, p, code, distance, middle, words):  # type: ignore[no-untyped-def]
    """Add atom v, which has one earlier neighbour p."""
    for a in range(v):
        d = distance[p, a]
        if d >= _FAR:
            _set_far(v, a, distance, middle, words)
        else:
            distance[v, a] = distance[a, v] = d + 1
            middle[v, a] = middle[a, v] = max(middle[p, a], np.int32(p + 1))
            words[v, a] = _joined(code, words[p, a], 1)
            words[a, v] = _joined(words[a, p], code, d)
    middle[v, p] = middle[p, v] = 0


@kernel
def _add_rows(v, earlier, distance, middle):  # type: ignore[no-untyped-def]
    """Distances and largest interior atoms from v through its earlier neighbours; False if one occurs twice."""
    for a in range(v):
        distance[v, a] = _FAR
        middle[v, a] = 0
    for p in earlier:
        if distance[v, p] == 1 and middle[v, p] == 0:
            return False
        for a in range(v):
            d = distance[p, a] + 1
            k = max(middle[p, a], np.int32(p + 1))
            if d < distance[v, a] or (d == distance[v, a] and k < middle[v, a]):
                distance[v, a] = d
                middle[v, a] = k
        distance[v, p] = 1
        middle[v, p] = 0
    return True


@kernel
def _add_words(v, earlier, codes, distance, middle, words):  # type: ignore[no-untyped-def]
    """The words of the paths between v and all earlier atoms, from the finished row of v."""
    for a in range(v):
        d = distance[v, a]
        if d >= _FAR:
            _set_far(v, a, distance, middle, words)
            continue
        p = a
        while middle[v, p] > 0:
            p = middle[v, p] - 1
        code = np.uint32(0)
        for slot in range(earlier.shape[0]):
            if earlier[slot] == p:
                code = codes[slot]
        distance[a, v] = d
        middle[a, v] = middle[v, a]
        words[v, a] = _joined(code, words[p, a], 1)
        words[a, v] = _joined(words[a, p], code, d - 1)


@kernel
def _round(v, distance, middle, words):  # type: ignore[no-untyped-def]
    """Round v of Floyd-Warshall for all pairs of earlier atoms."""
    for x in range(v):
        to_v = distance[x, v]
        for y in range(x):
            d = to_v + distance[v, y]
            if d < distance[x, y]:
                distance[x, y] = distance[y, x] = d
                middle[x, y] = middle[y, x] = v + 1
                words[x, y] = _joined(words[x, v], words[v, y], to_v)
                words[y, x] = _joined(words[y, v], words[v, x], distance[v, y])
