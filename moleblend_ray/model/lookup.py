"""Sums of rows of a table whose gradient a GPU computes by a matrix product."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.model.fused import uses_triton

_CHUNK: Final = 1 << 18
"""Bags whose rows are marked in memory at once by the backward pass."""


def sum_of_rows(rows: Tensor, table: Tensor) -> Tensor:
    """``rows`` (M, L) int64, different ones in each bag, and ``table`` (R, W) -> (M, W) sums of L rows.

    PyTorch's gradient of a table sorts all look-ups, and adds those of one row one after another: tables with hundreds of rows
    that millions of pairs read take longer than the attention. Marks of each bag's rows, (M, R), times the gradient are the
    same sum, and the order of its parts is fixed.
    """
    if table.device.type == "cpu" or not uses_triton():
        return F.embedding_bag(rows, table, mode="sum")
    output: Tensor = _SumOfRows.apply(rows, table)  # type: ignore[no-untyped-call]
    return output


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, table: Tensor) -> Tensor:
        context.save_for_backward(rows)
        context.num_rows = table.shape[0]
        return F.embedding_bag(rows, table, mode="sum")

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (rows,) = context.saved_tensors
        # Not in bfloat16: a row can have a million readers.
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(context.num_rows, gradient.shape[1], dtype=dtype)
        for begin in range(0, len(rows), _CHUNK):
            part, of_part = rows[begin : begin + _CHUNK], gradient[begin : begin + _CHUNK]
            marks = of_part.new_zeros(len(part), context.num_rows).scatter_(1, part, 1.0)
            total += marks.t() @ of_part
        return None, total.to(gradient.dtype)
