"""Clusters of similar molecules by Butina's algorithm, and the split by them.

Scaffolds differ by a single atom in a ring; molecules of different clusters differ more, so test molecules are less like those of
training than with a split by scaffold.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.fingerprints import ecfp
from moleblend_ray.chemistry.scaffolds import Split, deal_largest_first
from moleblend_ray.compilation import kernel
from moleblend_ray.evaluation.molecules.similarity import common_bits, num_bits_of, pack

logger = logging.getLogger(__name__)

_MANY_MOLECULES: Final = 20_000
"""Molecules whose comparison takes some ten seconds."""

_RADIUS: Final = 2
_NUM_BITS: Final = 1024
_CUTOFF: Final = 0.6
"""As in DeepChem's ``ButinaSplitter``: ECFP4 of 1,024 bits, neighbours up to this Tanimoto distance."""


def butina_split(smiles: Sequence[str], fractions: tuple[float, float, float]) -> Split:
    """Split molecules by clusters, as DeepChem's ``ButinaSplitter`` does with its defaults.

    The largest cluster comes first (of equal ones, that with more neighbours in all). Each goes to train if that stays within its
    share, else to valid likewise, else to test. Nothing is random.
    """
    ordered = sorted(butina_groups(smiles), key=len, reverse=True)
    return deal_largest_first(ordered, fractions)


def butina_groups(smiles: Sequence[str]) -> list[list[int]]:
    """The molecules of each cluster, as ascending indices, with the settings of DeepChem's ``ButinaSplitter``. Every pair of molecules
    is compared, twice at most."""
    if len(smiles) >= _MANY_MOLECULES:
        logger.info("comparing %d molecules with each other for the split", len(smiles))
    fingerprints = pack(ecfp(smiles, radius=_RADIUS, num_bits=_NUM_BITS))
    return [cluster.tolist() for cluster in butina_clusters(fingerprints, _CUTOFF)]


def butina_clusters(fingerprints: NDArray[np.uint64], cutoff: float) -> list[NDArray[np.int64]]:
    """Clusters of ``fingerprints`` (M, W): ascending indices, each of 0 to M - 1 in one cluster.

    Of those without a cluster, the one with the most neighbours (of equal ones, the last) makes one of itself and all of its
    neighbours that have none (Butina, J. Chem. Inf. Comput. Sci. 39, 747 (1999); as ``rdkit.ML.Cluster.Butina`` without
    reordering). Neighbours have a Tanimoto distance of at most ``cutoff``; a fingerprint without bits has none but itself.
    """
    by_word = np.ascontiguousarray(fingerprints.T)
    bits = num_bits_of(fingerprints)
    counts = np.zeros(len(bits), np.int64)
    near = np.zeros(len(bits), np.bool_)
    for index in range(len(bits)):
        _neighbours(index, by_word, bits, cutoff, near)
        counts[index] = near.sum()
    free = np.ones(len(bits), np.bool_)
    clusters: list[NDArray[np.int64]] = []
    for index in np.lexsort((np.arange(len(bits)), counts))[::-1]:
        if not free[index]:
            continue
        _neighbours(index, by_word, bits, cutoff, near)
        members = np.flatnonzero(near & free)
        free[members] = False
        clusters.append(members)
    return clusters


_TILE: Final = 1024


@kernel
def _neighbours(index, by_word, num_bits, cutoff, near):  # type: ignore[no-untyped-def]
    """Write to ``near`` (M,) which fingerprints, in columns of ``by_word`` (W, M), are neighbours of one, and that it is itself."""
    common = np.zeros(_TILE, np.uint64)
    query = by_word[:, index].copy()
    for begin in range(0, by_word.shape[1], _TILE):
        size = min(_TILE, by_word.shape[1] - begin)
        common_bits(query, by_word, begin, size, common)
        for j in range(size):
            shared = np.int64(common[j])
            union = num_bits[index] + num_bits[begin + j] - shared
            near[begin + j] = shared > 0 and 1.0 - shared / union <= cutoff
    near[index] = True
