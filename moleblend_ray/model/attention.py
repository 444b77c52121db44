"""Attention of packed tokens with an additive bias for each pair: PyTorch's fused kernel, and ours for CPUs.

Shape legend: B molecules, T tokens of the largest, S real tokens packed, H heads, D width, d = D / H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.dropout import draw_kept

NUM_PARTS = 3
"""Query, key and value, in this order."""


class HeadRows(NamedTuple):
    """Where vectors of d numbers lie in packed tokens (S, 3, H, d), and where in rectangles (3, B, H, T, d)."""

    packed: Tensor
    """(3 * B * H * T,) int64: packed row of each row of the rectangle; for padding its molecule's graph token."""
    padded: Tensor
    """(S * 3 * H,) int64: row of the rectangle of each packed row."""
    output: Tensor
    """(S * H,) int64: row in (B, H, T, d) of each packed row (S, H, d) of what attention gives."""


def head_rows(batch: MoleculeBatch, num_heads: int) -> HeadRows:
    """The rows of ``batch``, the same for all blocks."""
    B, T, H = batch.num_molecules, batch.max_atoms + 1, num_heads
    device = batch.token_index.device
    part = torch.arange(NUM_PARTS, device=device)
    head = torch.arange(H, device=device)
    S = len(batch.token_index)
    # Padding takes part in nothing: its columns have a bias of -inf, and nobody reads its rows. But it must be of its own
    # molecule, lest one that is not finite spreads.
    token = batch.graph_token.repeat_interleave(T)
    token[batch.token_index] = torch.arange(S, device=device)
    packed = (token.view(B, 1, T) * NUM_PARTS + part[:, None, None, None]) * H + head[:, None]
    place = batch.token_index - batch.token_molecule * T
    molecule = part[:, None] * B + batch.token_molecule[:, None, None]
    padded = (molecule * H + head) * T + place[:, None, None]
    return HeadRows(packed=packed.flatten(), padded=padded.flatten(), output=padded[:, 0].flatten())


def attend_fused(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout_probability: float = 0.0
) -> Tensor:
    """PyTorch's kernel: three (B, H, T, d) and ``bias`` (B, H, T, T), all of one dtype -> (B, H, T, d)."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout_probability
    )


def attend_padded(
    qkv: Tensor, bias: Tensor, batch: MoleculeBatch, dropout_probability: float = 0.0
) -> Tensor:
    """:func:`attend_fused` on rectangles: ``qkv`` (S, 3 * D) and ``bias`` (B, H, T, T) -> (S, D)."""
    padded = batch.pad_tokens(qkv)
    split = padded.view(*padded.shape[:2], NUM_PARTS, bias.shape[1], -1)
    query, key, value = split.permute(2, 0, 3, 1, 4)
    attended = attend_fused(query, key, value, bias.to(qkv.dtype), dropout_probability)
    return batch.pack_tokens(attended.transpose(1, 2).flatten(2))


def attend_by_rows(
    qkv: Tensor, bias: Tensor, rows: HeadRows, dropout_probability: float = 0.0
) -> Tensor:
    """The same as :func:`attend_padded`, for CPUs, whose fused kernel takes no bias with a gradient.

    Each head's rows are gathered straight from the packed tokens, and the backward pass is written out so that it
    gathers the other way: half of the time on a CPU went into copies between layouts. Softmax is in the type of
    ``bias``, which keeps bfloat16 tokens in float32 there.
    """
    output: Tensor = _Attention.apply(qkv, bias, rows, dropout_probability)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, qkv: Tensor, bias: Tensor, rows: HeadRows, dropout_probability: float
    ) -> Tensor:
        B, H, T, _ = bias.shape
        d = qkv.shape[1] // (NUM_PARTS * H)
        with torch.autocast(qkv.device.type, enabled=False):
            gathered = qkv.reshape(-1, d).index_select(0, rows.packed)
            query, key, value = gathered.view(NUM_PARTS, B * H, T, d)
            weight = torch.softmax(_scores(query, key, bias.flatten(0, 1)), -1)
            kept, scale = draw_kept(weight, dropout_probability)
            thinned = weight if kept is None else torch.where(kept, weight, 0.0)
            thinned = thinned.to(qkv.dtype)
            attended = _scaled_bmm(thinned, value, scale)
            output = attended.view(-1, d).index_select(0, rows.output)
        context.save_for_backward(query, key, value, weight, thinned, kept)
        context.rows, context.scale = rows, scale
        return output.view(-1, H * d)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, value, weight, thinned, kept = context.saved_tensors
        rows: HeadRows = context.rows
        _, T, d = query.shape
        # Padding must not add to the gradients of keys and values.
        of_output = gradient.new_zeros(query.shape).view(-1, d)
        of_output.index_copy_(0, rows.output, gradient.reshape(-1, d))
        of_output = of_output.view(query.shape)
        of_weight = _scaled_bmm(of_output, value.transpose(1, 2), context.scale)
        if kept is not None:
            of_weight = torch.where(kept, of_weight, 0.0)
        of_score = torch.ops.aten._softmax_backward_data(
            of_weight.to(weight.dtype), weight, -1, weight.dtype
        )
        factor = of_score.to(query.dtype)
        gathered = query.new_empty(NUM_PARTS, *query.shape)
        _scaled_bmm(factor, key, d**-0.5, out=gathered[0])
        _scaled_bmm(factor.transpose(1, 2), query, d**-0.5, out=gathered[1])
        _scaled_bmm(thinned.transpose(1, 2), of_output, context.scale, out=gathered[2])
        of_qkv = gathered.view(-1, d).index_select(0, rows.padded).view(len(gradient), -1)
        H = gradient.shape[1] // d
        return of_qkv, of_score.view(-1, H, T, T), None, None


def _scores(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """(B * H, T, T) scaled products plus ``bias``, in the type of the bias."""
    scale = query.shape[-1] ** -0.5
    if query.dtype == bias.dtype:
        return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    return torch.add(bias, torch.bmm(query, key.transpose(1, 2)), alpha=scale)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale`` times the batched product, without a pass over it for the scale."""
    if out is None:
        out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
