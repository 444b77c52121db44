"""Philox4x32-10 as one Triton kernel; PyTorch's operations would be a hundred launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["philox_words"]

_BLOCK = 1024
"""Counters of one program."""


def philox_words(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of the broadcast shape from four counter words, int64 from 0 to 2**32 - 1; ``seed`` has 64 bits."""
    c0, c1, c2, c3 = (word.contiguous() for word in torch.broadcast_tensors(*counter))  # type: ignore[no-untyped-call]
    words = torch.empty(4, *c0.shape, dtype=torch.int64, device=c0.device)
    count = c0.numel()
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    with torch.cuda.device_of(c0):  # type: ignore[no-untyped-call]
        _philox[(triton.cdiv(count, _BLOCK),)](
            c0, c1, c2, c3, words, count, low, high, BLOCK=_BLOCK
        )
    w0, w1, w2, w3 = words.unbind(0)
    return w0, w1, w2, w3


@triton.jit(do_not_specialize=["low", "high"])
def _philox(c0, c1, c2, c3, words, count, low, high, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    w0 = tl.load(c0 + at, mask=inside, other=0).to(tl.uint32)
    w1 = tl.load(c1 + at, mask=inside, other=0).to(tl.uint32)
    w2 = tl.load(c2 + at, mask=inside, other=0).to(tl.uint32)
    w3 = tl.load(c3 + at, mask=inside, other=0).to(tl.uint32)
    seed = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    w0, w1, w2, w3 = tl.philox(seed, w0, w1, w2, w3)
    tl.store(words + at, w0.to(tl.int64), mask=inside)
    tl.store(words + count + at, w1.to(tl.int64), mask=inside)
    tl.store(words + 2 * count + at, w2.to(tl.int64), mask=inside)
    tl.store(words + 3 * count + at, w3.to(tl.int64), mask=inside)
