"""Attention of packed tokens with an additive bias for each pair: one way for CPUs, one for GPUs, and PyTorch's kernel.

:func:`attention_of_blocks` chooses among them.

Shape legend: B molecules, T tokens of the largest, P the length of their rows in the kernels' bias, S real tokens packed,
H heads, D width, d = D / H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.dropout import draw_kept
from moleblend_ray.model.fused import PathScale, linear_and_residual, uses_triton
from moleblend_ray.model.precision import product_type

NUM_PARTS = 3
"""Parts of a ``qkv`` tensor: query, key and value, in this order."""

LARGEST_SEED: Final = (1 << 62) - 1
"""Largest seed that is drawn for the dropout of a kernel."""

Attend = Callable[[Tensor, nn.Linear, float, PathScale | None], tuple[Tensor, Tensor]]
"""Tokens (S, D), the linear map to queries, keys and values (S, 3 * D), probability of dropout, path scale -> two (S, D).

These are the result of attention before its last linear map, times the path scale if there is one, and the tokens, for the
residual sum.
"""


def attention_of_blocks(
    bias: Tensor, shared: SharedBias | None, batch: MoleculeBatch, num_blocks: int
) -> list[Attend]:
    """The fastest way to attend with ``bias`` (B, H, T, T), float32 with -inf in padding columns, once for each block.

    The blocks of one forward pass share whatever does not depend on the block. ``shared`` is :func:`share_bias` of it.
    """
    if not on_gpu(bias):
        if torch.is_grad_enabled():
            rows = head_rows(batch, bias.shape[1])
            return [functools.partial(_by_rows, bias, rows)] * num_blocks
        # PyTorch's fused CPU kernel, which has no gradient of the bias: 2.6 times as fast as gathered rows.
        return [functools.partial(_padded, bias, batch)] * num_blocks
    if shared is None:
        return [functools.partial(_padded, bias, batch)] * num_blocks
    seeds = torch.randint(LARGEST_SEED, (num_blocks, 1), device=bias.device)
    return [functools.partial(_packed, shared, batch, seed) for seed in seeds.unbind(0)]


def share_bias(bias: Tensor) -> SharedBias | None:
    """``bias`` (B, H, T, T) for the Triton kernels of a forward pass; None if they cannot take it.

    They need a GPU, float32, T up to MAX_TOKENS, and that Triton works.
    """
    if not on_gpu(bias) or bias.dtype != torch.float32 or not uses_triton():
        return None
    # The module imports Triton, which CPU builds of PyTorch lack.
    from moleblend_ray.model.attention_kernels import MAX_TOKENS

    return SharedBias(bias) if bias.shape[-1] <= MAX_TOKENS else None


def _by_rows(
    bias: Tensor,
    rows: HeadRows,
    tokens: Tensor,
    to_qkv: nn.Linear,
    probability: float,
    path: PathScale | None,
) -> tuple[Tensor, Tensor]:
    return _scaled(attend_by_rows(to_qkv(tokens), bias, rows, probability), path), tokens


def _padded(
    bias: Tensor,
    batch: MoleculeBatch,
    tokens: Tensor,
    to_qkv: nn.Linear,
    probability: float,
    path: PathScale | None,
) -> tuple[Tensor, Tensor]:
    return _scaled(attend_padded(to_qkv(tokens), bias, batch, probability), path), tokens


def _scaled(attended: Tensor, path: PathScale | None) -> Tensor:
    return attended if path is None else attended * path.of_tokens().to(attended.dtype)


def _packed(
    shared: SharedBias,
    batch: MoleculeBatch,
    seed: Tensor,
    tokens: Tensor,
    to_qkv: nn.Linear,
    probability: float,
    path: PathScale | None,
) -> tuple[Tensor, Tensor]:
    # The matrix product adds the bias at no cost; only its gradient comes from the attention kernel, which has it at hand.
    qkv, tokens = linear_and_residual(tokens, to_qkv.weight, to_qkv.bias)
    return attend_packed(qkv, to_qkv.bias, shared, batch, seed, probability, path), tokens


class HeadRows(NamedTuple):
    """Row numbers that lead from packed tokens (S, 3, H, d) to padded rectangles (3, B, H, T, d) and back.

    A row is one vector of d numbers.
    """

    packed: Tensor
    """(3 * B * H * T,) int64: packed row of each padded row; for padding that of its molecule's graph token."""
    padded: Tensor
    """(S * 3 * H,) int64: padded row of each packed row."""
    output: Tensor
    """(S * H,) int64: row in the padded output (B, H, T, d) of each row of the packed output (S, H, d)."""


def head_rows(batch: MoleculeBatch, num_heads: int) -> HeadRows:
    """The row numbers of ``batch``; all blocks use the same ones."""
    B, T, H = batch.num_molecules, batch.max_atoms + 1, num_heads
    device = batch.token_index.device
    part = torch.arange(NUM_PARTS, device=device)
    head = torch.arange(H, device=device)
    S = len(batch.token_index)
    # Padding has no influence: its columns have a bias of -inf, and its rows are never read. It still takes values of
    # its own molecule, so that infinities and NaN of one molecule do not reach others.
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
    """PyTorch's kernel: three tensors (B, H, T, d) and ``bias`` (B, H, T, T), all of one dtype -> (B, H, T, d)."""
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
    """The same as :func:`attend_padded`, for CPUs, where PyTorch's fused kernel has no gradient of the bias.

    Each head's rows are gathered directly from the packed tokens, and the backward pass is written by hand so that it
    gathers in the opposite direction: copies between layouts took half of the time on a CPU. Softmax runs in the type
    of ``bias``, so in float32 even if the tokens are bfloat16.
    """
    output: Tensor = _Attention.apply(qkv, bias, rows, dropout_probability)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, rows: HeadRows, dropout_probability: float
    ) -> Tensor:
        B, H, T, _ = bias.shape
        d = qkv.shape[1] // (NUM_PARTS * H)
        with torch.autocast(qkv.device.type, enabled=False):
            gathered = qkv.reshape(-1, d).index_select(0, rows.packed)
            query, key, value = gathered.view(NUM_PARTS, B * H, T, d)
            weight = torch.softmax(_scores(query, key, bias.flatten(0, 1)), -1)
            kept, scale = draw_kept(weight, dropout_probability)
            kept_weight = weight if kept is None else torch.where(kept, weight, 0.0)
            kept_weight = kept_weight.to(qkv.dtype)
            attended = _scaled_bmm(kept_weight, value, scale)
            output = attended.view(-1, d).index_select(0, rows.output)
        ctx.save_for_backward(query, key, value, weight, kept_weight, kept)
        ctx.rows, ctx.scale = rows, scale
        return output.view(-1, H * d)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, value, weight, kept_weight, kept = ctx.saved_tensors
        rows: HeadRows = ctx.rows
        _, T, d = query.shape
        # Zero in padding, which must not add to the gradients of keys and values.
        grad_attended = grad_output.new_zeros(query.shape).view(-1, d)
        grad_attended.index_copy_(0, rows.output, grad_output.reshape(-1, d))
        grad_attended = grad_attended.view(query.shape)
        grad_weight = _scaled_bmm(grad_attended, value.transpose(1, 2), ctx.scale)
        if kept is not None:
            grad_weight = torch.where(kept, grad_weight, 0.0)
        # A score is a scaled product plus the bias: both have the same gradient.
        grad_bias = torch.ops.aten._softmax_backward_data(
            grad_weight.to(weight.dtype), weight, -1, weight.dtype
        )
        grad_score = grad_bias.to(query.dtype)
        grad_gathered = query.new_empty(NUM_PARTS, *query.shape)
        _scaled_bmm(grad_score, key, d**-0.5, out=grad_gathered[0])
        _scaled_bmm(grad_score.transpose(1, 2), query, d**-0.5, out=grad_gathered[1])
        _scaled_bmm(kept_weight.transpose(1, 2), grad_attended, ctx.scale, out=grad_gathered[2])
        grad_qkv = grad_gathered.view(-1, d).index_select(0, rows.padded).view(len(grad_output), -1)
        H = grad_output.shape[1] // d
        return grad_qkv, grad_bias.view(-1, H, T, T), None, None


def _scores(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """(B * H, T, T) scaled products plus ``bias``, in the type of the bias."""
    scale = query.shape[-1] ** -0.5
    if query.dtype == bias.dtype:
        return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    return torch.add(bias, torch.bmm(query, key.transpose(1, 2)), alpha=scale)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale`` times the batched product of ``left`` and ``right``, without a separate pass over it for the scale."""
    if out is None:
        out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


class SharedBias:
    """The bias of all blocks, in the type of their products, with one gradient to which every block adds its own.

    Autograd would allocate a gradient for every block and add them up in separate passes.
    """

    def __init__(self, bias: Tensor) -> None:
        """``bias`` (B, H, T, T) float32."""
        self.gradient: Tensor | None = None
        """(B, H, T, P) float32: sum over the blocks whose backward pass is done; None before the first."""
        self.values: Tensor = _Share.apply(bias, self, product_type(bias))  # type: ignore[no-untyped-call]
        """(B, H, T, P), the bias that the blocks read, with rows that end in undefined numbers."""

    def accumulator(self) -> Tensor:
        """The tensor (B, H, T, P) float32 to which a block adds its gradient."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.values, dtype=torch.float32)
        return self.gradient

    def take_gradient(self) -> Tensor | None:
        """The sum of the gradients; the next one starts from zero."""
        gradient, self.gradient = self.gradient, None
        return gradient


class _Share(torch.autograd.Function):
    """Passes the bias on to the blocks, and their summed gradient back.

    The blocks return no gradient to autograd, but it still runs this backward pass after all of theirs.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, shared: SharedBias, dtype: torch.dtype) -> Tensor:
        # The module imports Triton, which CPU builds of PyTorch lack.
        from moleblend_ray.model.attention_kernels import row_length

        ctx.shared, ctx.num_tokens = shared, bias.shape[-1]
        ctx.set_materialize_grads(False)
        values = bias.new_empty(*bias.shape[:-1], row_length(ctx.num_tokens), dtype=dtype)
        values[..., : ctx.num_tokens] = bias
        return values

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_values = ctx.shared.take_gradient()
        if grad_output is not None:
            grad_values = grad_output.float() if grad_values is None else grad_values + grad_output
        if grad_values is None:
            return None, None, None
        return grad_values[..., : ctx.num_tokens], None, None


def attend_packed(
    qkv: Tensor,
    linear_bias: Tensor,
    shared: SharedBias,
    batch: MoleculeBatch,
    seed: Tensor,
    dropout_probability: float = 0.0,
    path: PathScale | None = None,
) -> Tensor:
    """The same as :func:`attend_padded` of ``qkv`` (S, 3 * D), by Triton kernels.

    ``linear_bias`` (3 * D,) is a detached part of ``qkv`` and gets its gradient here. Nothing is padded or copied to another
    layout. ``seed`` (1,) int64 decides what dropout removes. The result is multiplied with ``path``.
    """
    output: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        qkv, linear_bias, shared.values, shared, batch, seed, dropout_probability, path
    )
    return output


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        linear_bias: Tensor,
        bias: Tensor,
        shared: SharedBias,
        batch: MoleculeBatch,
        seed: Tensor,
        dropout_probability: float,
        path: PathScale | None,
    ) -> Tensor:
        from moleblend_ray.model.attention_kernels import attention_forward

        ctx.save_for_backward(qkv, bias, batch.graph_token, batch.num_atoms, seed)
        ctx.linear_bias_dtype = linear_bias.dtype
        ctx.shared, ctx.dropout_probability, ctx.path = shared, dropout_probability, path
        ctx.groups = batch.size_groups
        molecules = batch.graph_token, batch.num_atoms, batch.size_groups
        return attention_forward(qkv, bias, *molecules, seed, dropout_probability, path)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.attention_kernels import attention_backward

        qkv, bias, first_token, num_atoms, seed = ctx.saved_tensors
        grad_qkv, grad_linear_bias = attention_backward(
            grad_output.contiguous(),
            qkv,
            bias,
            first_token,
            num_atoms,
            ctx.groups,
            seed,
            ctx.dropout_probability,
            ctx.path,
            ctx.shared.accumulator(),
        )
        return grad_qkv, grad_linear_bias.to(ctx.linear_bias_dtype), *[None] * 6
