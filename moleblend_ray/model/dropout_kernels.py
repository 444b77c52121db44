"""Which elements dropout keeps, for other Triton kernels.

A hash of the seed and the place of an element decides, so the backward pass computes the same mask again.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["kept_in_tile"]


@triton.jit
def kept_in_tile(seed, number, place, probability):  # type: ignore[no-untyped-def]
    """True with probability 1 - ``probability``, for an int64 ``seed``, the ``number`` of a tile (int32 or int64) and the
    ``place`` of an element within it (below 2**16).

    The seed and the number are mixed once for the tile, into two numbers: one is mixed with each place, the other makes
    tiles differ whose first numbers agree in all bits that places do not change. Six instructions for each element are
    left (Philox, which took as long as all the rest of attention, needs over a hundred). The hash function of a place
    is :func:`_mix` without its first step, which would change nothing, as places have no bits above the 16th, and
    without its last, which changes none of the upper bits that decide.
    """
    first = _mix(_mix(number.to(tl.uint32) ^ seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    second = _mix(first + 0x9E3779B9)
    bits = (place.to(tl.uint32) ^ first) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B + second
    return bits >= tl.cast(probability * 4294967296.0, tl.uint32)


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    """The hash function with two multiplications of C. Wellons, "Prospecting for Hash Functions" (2018)."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)
