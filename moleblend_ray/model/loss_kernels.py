"""Triton kernels of a weighted cross entropy: logits are read in their own type, and no probabilities are written.

Shape legend: M predictions, C classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.fused import on_its_device

__all__ = ["cross_entropy_backward", "cross_entropy_forward"]

_ROWS = 32
"""Predictions of one program."""


@on_its_device
def cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted losses (M,) and log-sum-exp (M,), float32, of ``logits`` (M, C) and ``target`` (M,) int64.

    ``weight`` is (M,) float32. The loss of a negative target is 0.
    """
    count, classes = logits.shape
    loss, normaliser = torch.empty(2, count, dtype=torch.float32, device=logits.device).unbind(0)
    _cross_entropy[(triton.cdiv(count, _ROWS),)](
        logits, target, weight, loss, normaliser, count,
        CLASSES=classes, TILE=triton.next_power_of_2(classes), ROWS=_ROWS,
    )  # fmt: skip
    return loss, normaliser


@on_its_device
def cross_entropy_backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor, normaliser: Tensor
) -> Tensor:
    """(M, C) gradient of the logits, from that of the sum of all losses, ()."""
    count, classes = logits.shape
    grad_logits = torch.empty_like(logits)
    _cross_entropy_backward[(triton.cdiv(count, _ROWS),)](
        grad_output, logits, target, weight, normaliser, grad_logits, count,
        CLASSES=classes, TILE=triton.next_power_of_2(classes), ROWS=_ROWS,
    )  # fmt: skip
    return grad_logits


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, target, weight, loss, normaliser, count,
    CLASSES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    held = row < count
    inside = held[:, None] & (column < CLASSES)[None, :]
    logit = tl.load(logits + row[:, None] * CLASSES + column[None, :], mask=inside, other=0.0)
    logit = tl.where((column < CLASSES)[None, :], logit.to(tl.float32), float("-inf"))
    largest = tl.max(logit, 1)
    total = tl.log(tl.sum(tl.exp(logit - largest[:, None]), 1)) + largest
    wanted = tl.load(target + row, mask=held, other=-1)
    hit = column[None, :] == wanted[:, None]
    chosen = tl.sum(tl.where(hit, logit, 0.0), 1)
    row_weight = tl.load(weight + row, mask=held, other=0.0)
    tl.store(loss + row, tl.where(wanted >= 0, (total - chosen) * row_weight, 0.0), mask=held)
    tl.store(normaliser + row, total, mask=held)


@triton.jit
def _cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad_output, logits, target, weight, normaliser, grad_logits, count,
    CLASSES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    held = row < count
    inside = held[:, None] & (column < CLASSES)[None, :]
    at = row[:, None] * CLASSES + column[None, :]
    logit = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(normaliser + row, mask=held, other=0.0)
    wanted = tl.load(target + row, mask=held, other=-1)
    grad_row = tl.load(weight + row, mask=held, other=0.0) * tl.load(grad_output)
    grad_row = tl.where(wanted >= 0, grad_row, 0.0)
    probability = tl.exp(logit - total[:, None])
    result = probability - tl.where(column[None, :] == wanted[:, None], 1.0, 0.0)
    # Selected, not multiplied by 0: logits without a target may be infinite.
    result = tl.where((wanted >= 0)[:, None], result * grad_row[:, None], 0.0)
    tl.store(grad_logits + at, result.to(grad_logits.dtype.element_ty), mask=inside)
