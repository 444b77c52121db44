"""Which elements dropout keeps, for other Triton kernels: a hash of seed and place, so that a backward pass finds them again."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["kept"]


@triton.jit
def kept(seed, place, probability):  # type: ignore[no-untyped-def]
    """True with 1 - ``probability``, for int64 ``seed`` and int32 or int64 ``place``.

    Two rounds of a mixing function of 32 bits (bias of its avalanche below 0.2 %), one for each half of the seed: a sixth of
    the instructions of Philox, which took as long as all the rest of attention.
    """
    bits = place.to(tl.uint32) ^ seed.to(tl.uint32)
    bits = _mix(bits) + (seed >> 32).to(tl.uint32)
    bits = _mix(bits)
    # 24 bits are what a float32 holds exactly.
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= probability


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    """C. Wellons, "Prospecting for Hash Functions" (2018), the one of two multiplications."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)
