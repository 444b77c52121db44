"""Attention of packed tokens with an additive bias for each pair: ours for CPUs and for GPUs, and PyTorch's fused kernel.

:func:`attention_of_blocks` chooses. Shape legend: B molecules, T tokens of the largest, S real tokens packed, H heads, D width, d = D / H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.dropout import draw_kept
from moleblend_ray.model.fused import uses_triton
from moleblend_ray.model.precision import product_type

NUM_PARTS = 3
"""Query, key and value, in this order."""

LARGEST_SEED: Final = (1 << 62) - 1
"""Of a kernel's dropout."""

Attend = Callable[[Tensor, nn.Linear, float], Tensor]
"""Tokens (S, D), the linear map to their queries, keys and values (S, 3 * D), and the probability of dropout -> (S, D), before the
last linear map."""


def attention_of_blocks(bias: Tensor, batch: MoleculeBatch, num_blocks: int) -> list[Attend]:
    """For each block the fastest way to attend with ``bias`` (B, H, T, T), float32 with -inf in padding columns.

    The blocks of one forward pass share what all of them need.
    """
    if bias.device.type == "cpu":
        if torch.is_grad_enabled():
            rows = head_rows(batch, bias.shape[1])
            return [functools.partial(_by_rows, bias, rows)] * num_blocks
        # Without a gradient a CPU has a fused kernel as well, 2.6 times faster than the gathered rows.
        return [functools.partial(_padded, bias, batch)] * num_blocks
    if not kernels_fit(bias):
        return [functools.partial(_padded, bias, batch)] * num_blocks
    shared = SharedBias(bias)
    seeds = torch.randint(LARGEST_SEED, (num_blocks, 1), device=bias.device)
    return [functools.partial(_packed, shared, batch, seed) for seed in seeds.unbind(0)]


def kernels_fit(bias: Tensor) -> bool:
    """True if the Triton kernels can take ``bias`` (B, H, T, T): float32, molecules that fit a tile, Triton at hand."""
    if bias.dtype != torch.float32 or not uses_triton():
        return False
    # Needs Triton, which CPU builds of PyTorch lack.
    from moleblend_ray.model.attention_kernels import MAX_TOKENS

    return bias.shape[-1] <= MAX_TOKENS


def _by_rows(
    bias: Tensor, rows: HeadRows, tokens: Tensor, to_qkv: nn.Linear, probability: float
) -> Tensor:
    return attend_by_rows(to_qkv(tokens), bias, rows, probability)


def _padded(
    bias: Tensor, batch: MoleculeBatch, tokens: Tensor, to_qkv: nn.Linear, probability: float
) -> Tensor:
    return attend_padded(to_qkv(tokens), bias, batch, probability)


def _packed(
    shared: SharedBias,
    batch: MoleculeBatch,
    seed: Tensor,
    tokens: Tensor,
    to_qkv: nn.Linear,
    probability: float,
) -> Tensor:
    products = F.linear(tokens, to_qkv.weight)
    return attend_packed(products, to_qkv.bias, shared, batch, seed, probability)


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


class SharedBias:
    """The bias of all blocks, in the type of their products, with one gradient to which each block adds its own.

    Autograd by itself would make a tensor for each block, and pass over two of them to add it.
    """

    def __init__(self, bias: Tensor) -> None:
        """``bias`` (B, H, T, T) float32."""
        self.gradient: Tensor | None = None
        """(B, H, T, T) float32 sum over the blocks whose backward pass is done."""
        self.values: Tensor = _Share.apply(bias, self, product_type(bias))  # type: ignore[no-untyped-call]
        """(B, H, T, T)."""

    def add_here(self) -> Tensor:
        """The tensor to which a block adds its gradient."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.values, dtype=torch.float32)
        return self.gradient

    def take_gradient(self) -> Tensor | None:
        """The sum, which begins anew."""
        gradient, self.gradient = self.gradient, None
        return gradient


class _Share(torch.autograd.Function):
    """Hands the bias to the blocks. They return no gradient of their own, but autograd still runs this node after all
    of them."""

    @staticmethod
    def forward(context: Any, bias: Tensor, shared: SharedBias, dtype: torch.dtype) -> Tensor:
        context.shared = shared
        context.set_materialize_grads(False)
        return bias.view_as(bias) if bias.dtype == dtype else bias.to(dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        total = context.shared.take_gradient()
        if gradient is not None:
            total = gradient.float() if total is None else total + gradient
        return total, None, None


def attend_packed(
    qkv: Tensor,
    offset: Tensor,
    shared: SharedBias,
    batch: MoleculeBatch,
    seed: Tensor,
    dropout_probability: float = 0.0,
) -> Tensor:
    """The same as :func:`attend_padded` of ``qkv + offset``, (S, 3 * D) and (3 * D,), by Triton kernels, without padding and
    without any copy in another layout.

    ``seed`` (1,) int64 decides what dropout removes.
    """
    output: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        qkv, offset, shared.values, shared, batch, seed, dropout_probability
    )
    return output


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        qkv: Tensor,
        offset: Tensor,
        bias: Tensor,
        shared: SharedBias,
        batch: MoleculeBatch,
        seed: Tensor,
        dropout_probability: float,
    ) -> Tensor:
        from moleblend_ray.model.attention_kernels import attention_forward

        context.save_for_backward(qkv, offset, bias, batch.graph_token, batch.num_atoms, seed)
        context.shared, context.dropout_probability = shared, dropout_probability
        context.groups = batch.size_groups
        molecules = batch.graph_token, batch.num_atoms, batch.size_groups
        return attention_forward(qkv, offset, bias, *molecules, seed, dropout_probability)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.attention_kernels import attention_backward

        qkv, offset, bias, first_token, num_atoms, seed = context.saved_tensors
        of_qkv, of_offset = attention_backward(
            gradient.contiguous(),
            qkv,
            offset,
            bias,
            first_token,
            num_atoms,
            context.groups,
            seed,
            context.dropout_probability,
            context.shared.add_here(),
        )
        return of_qkv, of_offset.to(offset.dtype), None, None, None, None, None
