"""Sums of rows of a table, with a gradient that is computed by a matrix product on GPUs."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.fused import uses_triton

_CHUNK: Final = 1 << 18
"""Bags for which the backward pass has marks in memory at once."""


def sum_of_rows(rows: Tensor, table: Tensor) -> Tensor:
    """``rows`` (M, L) int64, no row twice in a bag, and ``table`` (R, W) -> (M, W) sums of the L rows of each bag.

    For the gradient of a table PyTorch sorts all look-ups and adds those of one row in sequence. For tables of hundreds
    of rows that millions of pairs read, this takes longer than the attention. The same sum is a matrix product: marks
    (M, R), 1 where a bag reads a row, transposed, times the gradient. The order of its terms is fixed.
    """
    if not (on_gpu(table) and uses_triton()):
        return F.embedding_bag(rows, table, mode="sum")
    output: Tensor = _SumOfRows.apply(rows, table)  # type: ignore[no-untyped-call]
    return output


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = table.shape[0]
        return F.embedding_bag(rows, table, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        (rows,) = ctx.saved_tensors
        # Not in bfloat16: a row can be read a million times.
        dtype = torch.promote_types(grad_output.dtype, torch.float32)
        total = grad_output.new_zeros(ctx.num_rows, grad_output.shape[1], dtype=dtype)
        for begin in range(0, len(rows), _CHUNK):
            part, grad_part = rows[begin : begin + _CHUNK], grad_output[begin : begin + _CHUNK]
            marks = grad_part.new_zeros(len(part), ctx.num_rows).scatter_(1, part, 1.0)
            total += marks.t() @ grad_part
        return None, total.to(grad_output.dtype)
