"""Similarity of molecules to the nearest of other molecules, by circular fingerprints packed into 64-bit words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from moleblend_ray.chemistry.fingerprints import ecfp
from moleblend_ray.compilation import kernel
from moleblend_ray.errors import DataError

RADIUS: Final = 2
"""Radius of the environments of an atom, in bonds: ECFP4."""

NUM_BITS: Final = 2048

_TILE: Final = 256
"""Fingerprints per block: their words (64 KiB) and counts stay in the cache of a core while all queries use them."""


def packed_ecfp(smiles: Sequence[str]) -> NDArray[np.uint64]:
    """ECFP4 of ``smiles`` as (M, 32) uint64, 2,048 bits each; all bits are 0 for a SMILES that RDKit cannot read."""
    return pack(ecfp(smiles, radius=RADIUS, num_bits=NUM_BITS))


def pack(bits: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(M, B) zeros and ones as (M, B / 64) words; B is a multiple of 64."""
    return np.packbits(bits, axis=1).view(np.uint64)


def nearest_similarity(
    queries: NDArray[np.uint64],
    others: NDArray[np.uint64],
    leave_out: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Tanimoto similarity (Q,) float64 of each of ``queries`` (Q, W) to the most similar of ``others`` (N, W).

    ``leave_out`` (Q,) gives for each query a row of ``others`` that does not count. If no row counts, or a query has no
    bit, the similarity is 0. Every pair is computed: bounds from the numbers of bits (Swamidass and Baldi, J. Chem.
    Inf. Model. 47, 302 (2007)) would save only 2 to 6 % of the pairs in a search for the nearest. Raises DataError if
    the widths differ.
    """
    if queries.ndim != 2 or queries.shape[1:] != others.shape[1:]:
        raise DataError(
            f"fingerprints of shapes {queries.shape} and {others.shape} cannot be compared: expected rows of "
            "equally many 64-bit words"
        )
    if leave_out is None:
        leave_out = np.full(len(queries), -1, np.int64)
    best = np.zeros(len(queries))
    # Word by word over many fingerprints, so that the innermost loop reads contiguous memory.
    by_word = np.ascontiguousarray(others.T)
    _nearest(queries, by_word, num_bits_of(queries), num_bits_of(others), leave_out, best)
    return best


def num_bits_of(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number of bits set in each row."""
    counts: NDArray[np.int64] = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return counts


def _type_popcount(_typing_context: Any, _word: Any) -> Any:
    """How Numba types and compiles ``_popcount``."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


# In kernels: the number of bits set in a uint64. One instruction, which also exists for eight words at a time.
_popcount: Any = intrinsic(_type_popcount)


@kernel
def common_bits(query, by_word, begin, size, common):  # type: ignore[no-untyped-def]
    """Write to ``common`` how many bits ``query`` (W,) shares with each of ``size`` fingerprints, columns ``begin`` and following of
    ``by_word`` (W, M)."""
    common[:size] = 0
    for word in range(query.shape[0]):
        bits = query[word]
        if bits != 0:
            row = by_word[word, begin : begin + size]
            for j in range(size):
                common[j] += _popcount(bits & row[j])


@kernel
def _nearest(queries, by_word, query_bits, other_bits, leave_out, best):  # type: ignore[no-untyped-def]
    common = np.zeros(_TILE, np.uint64)
    for begin in range(0, by_word.shape[1], _TILE):
        size = min(_TILE, by_word.shape[1] - begin)
        for i in range(queries.shape[0]):
            common_bits(queries[i], by_word, begin, size, common)
            nearest = best[i]
            for j in range(size):
                shared = np.int64(common[j])
                if shared > 0 and begin + j != leave_out[i]:
                    similarity = shared / (query_bits[i] + other_bits[begin + j] - shared)
                    if similarity > nearest:
                        nearest = similarity
            best[i] = nearest
