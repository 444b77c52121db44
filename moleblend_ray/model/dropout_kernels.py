"""Which elements dropout keeps, for other Triton kernels.

A hash of the seed and the index of an element decides, so the backward pass computes the same mask again.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["kept", "kept_in_tile"]


@triton.jit
def kept(seed, place, probability):  # type: ignore[no-untyped-def]
    """True with probability 1 - ``probability``, for int64 ``seed`` and ``place`` (int32 or int64), an element's index.

    Two rounds of a 32-bit mixing function (avalanche bias below 0.2 %), one for each half of the seed, take a sixth of
    the instructions of Philox. Philox took as long as all the rest of attention.
    """
    bits = place.to(tl.uint32) ^ seed.to(tl.uint32)
    bits = _mix(bits) + (seed >> 32).to(tl.uint32)
    return _survives(_mix(bits), probability)


@triton.jit
def kept_in_tile(seed, number, place, probability):  # type: ignore[no-untyped-def]
    """The same for tile ``number`` (int32) and ``place`` (int32) within it, with half the instructions for each element.

    The seed and the number are mixed once for the tile, into two numbers: one is mixed with each place, the other makes
    tiles differ whose first numbers agree in all bits that places do not change.
    """
    first = _mix(_mix(number.to(tl.uint32) ^ seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    second = _mix(first + 0x9E3779B9)
    return _survives(_mix(place.to(tl.uint32) ^ first) + second, probability)


@triton.jit
def _survives(bits, probability):  # type: ignore[no-untyped-def]
    # A float32 holds integers of 24 bits exactly.
    return (bits >> 8).to(tl.float32) >= probability * 16777216.0


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    """The hash function with two multiplications of C. Wellons, "Prospecting for Hash Functions" (2018)."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)
