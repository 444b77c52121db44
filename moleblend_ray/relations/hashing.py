"""Keyed 64-bit mixing: the counter-based randomness of data order, conformer choice and rotations.

There is no state. A draw is a pure function of its key words, so it does not depend on the number of processes or on
restarts.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2: Final = np.uint64(0x94D049BB133111EB)


def mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each 64-bit word scrambled by the finaliser of SplitMix64, which is a bijection."""
    word = (word ^ (word >> np.uint64(30))) * _MULTIPLIER_1
    word = (word ^ (word >> np.uint64(27))) * _MULTIPLIER_2
    return word ^ (word >> np.uint64(31))


def keyed_hash(*words: ArrayLike) -> NDArray[np.uint64]:
    """A uint64 hash of integer words, which are broadcast against each other.

    The order of the words matters: ``keyed_hash(a, b) != keyed_hash(b, a)``.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        # Arrays overflow silently, whereas NumPy scalars would warn.
        bits = np.atleast_1d(np.asarray(word, dtype=np.int64)).astype(np.uint64)
        state = mix((state + _GOLDEN_GAMMA) ^ mix(bits + _GOLDEN_GAMMA))
    return state
