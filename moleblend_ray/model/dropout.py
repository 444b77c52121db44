"""Dropout with cheap random bits on a CPU.

PyTorch's CPU kernel draws a double for each element and keeps a mask in the tensor's own dtype; this took 9 % of a
training step. Here four elements share a 64-bit draw, and the mask is boolean.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.model.device import on_gpu

_LEVELS: Final = 1 << 16
"""A probability is rounded to a multiple of 1 / 65536 below 1. Kept elements are scaled by the rounded probability, so
the mean is exact."""


def dropout(values: Tensor, probability: float, *, training: bool) -> Tensor:
    """``values`` with each element set to 0 with ``probability``, otherwise divided by 1 - ``probability``.

    Unchanged if not ``training``. Draws from PyTorch's generator of the device.
    """
    if not training or probability == 0.0:
        return values
    if on_gpu(values):
        return F.dropout(values, probability, training=True)
    kept, scale = draw_kept(values, probability)
    output: Tensor = _KeepAndScale.apply(values, kept, scale)  # type: ignore[no-untyped-call]
    return output


def draw_kept(like: Tensor, probability: float) -> tuple[Tensor | None, float]:
    """A boolean mask of the shape of ``like`` on the CPU, False for elements to drop, and the factor for the others.

    The mask is None if nothing is dropped.
    """
    if probability == 0.0:
        return None, 1.0
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device="cpu")
    words.random_(-(1 << 63), None)
    levels = words.view(torch.int16)[: like.numel()].view(like.shape)
    return levels >= dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped)


class _KeepAndScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.where(kept, values, 0.0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, grad_output, 0.0).mul_(ctx.scale), None, None
