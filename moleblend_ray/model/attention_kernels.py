"""Triton kernels of attention with a bias for each pair: one program computes one head of one molecule.

A molecule's tokens fit one tile, so nothing is summed in parts. Queries, keys and values are read from the packed tokens
where the linear map left them, and their gradients are written there; neither scores nor weights ever reach memory, and the
gradient of the bias is added to one tensor by all blocks in turn. The bias of that linear map, called offset here, is added in
the kernel, which adds up its gradient over each molecule, too.

Shape legend: B molecules, T tokens of the largest, S real tokens packed, H heads, D width, d = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.batch import SizeGroup
from moleblend_ray.model.dropout_kernels import kept
from moleblend_ray.model.fused import on_its_device

__all__ = ["MAX_TOKENS", "attention_backward", "attention_forward"]

MAX_TOKENS = 128
"""Tokens of the largest molecule that a tile holds in registers."""

_SMALLEST_TILE = 16
"""Of a matrix product of tensor cores, here along the width of a head."""


@on_its_device
def attention_forward(
    qkv: Tensor,
    offset: Tensor,
    bias: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
    seed: Tensor,
    dropout_probability: float,
) -> Tensor:
    """(S, D) of ``qkv`` (S, 3 * D) plus ``offset`` (3 * D,), and ``bias`` (B, H, T, T), contiguous.

    ``first_token`` and ``num_atoms`` (B,) int64: a molecule is the rows from its first one on, one more than it has
    atoms. ``groups`` are all molecules. ``seed`` (1,) int64 on the device decides what dropout removes.
    """
    output = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    for group in groups:
        grid, constants = _launch(qkv, bias, group, dropout_probability)
        _forward[grid](
            qkv, offset, bias, first_token, num_atoms, seed, output,
            group.first, bias.shape[2], dropout_probability, **constants,
        )  # fmt: skip
    return output


@on_its_device
def attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    offset: Tensor,
    bias: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
    seed: Tensor,
    dropout_probability: float,
    of_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``qkv`` (S, 3 * D) and, in float32, of ``offset`` (3 * D,), from that of the output (S, D); the one of the
    bias is added to ``of_bias`` (B, H, T, T) float32."""
    of_qkv = torch.empty_like(qkv)
    of_offsets = torch.empty(len(num_atoms), qkv.shape[1], dtype=torch.float32, device=qkv.device)
    for group in groups:
        grid, constants = _launch(qkv, bias, group, dropout_probability)
        _backward[grid](
            gradient, qkv, offset, bias, first_token, num_atoms, seed, of_qkv, of_offsets, of_bias,
            group.first, bias.shape[2], dropout_probability, **constants,
        )  # fmt: skip
    return of_qkv, of_offsets.sum(0)


def _launch(
    qkv: Tensor, bias: Tensor, group: SizeGroup, dropout_probability: float
) -> tuple[tuple[int], dict[str, object]]:
    H, tile = bias.shape[1], group.tile
    head_width = qkv.shape[1] // (3 * H)
    return (group.molecules * H,), {
        "NUM_HEADS": H,
        "HEAD_WIDTH": head_width,
        "TILE": tile,
        "WIDTH_TILE": max(_SMALLEST_TILE, triton.next_power_of_2(head_width)),
        "DROPS": dropout_probability > 0.0,
        # By default float32 factors would be rounded to 10 bits.
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
        # With fewer, registers of the backward pass spill; with more, small tiles are slower.
        "num_warps": 16 if tile > 64 else max(1, tile // 16),
    }


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    first_token, num_atoms, first_molecule, T,
    NUM_HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """Which molecule and head this program computes, and where their numbers are."""
    molecule = first_molecule + tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    number = molecule * NUM_HEADS + head
    tokens = tl.load(num_atoms + molecule).to(tl.int32) + 1
    row = tl.arange(0, TILE)[:, None]
    column = tl.arange(0, TILE)[None, :]
    feature = tl.arange(0, WIDTH_TILE)[None, :]
    # Of the rows of (S, 3, H, d) and (S, H, d); molecules together can pass 2**31 numbers.
    packed = tl.load(first_token + molecule) + row
    return tokens, row, column, feature, packed, molecule, head, number, row * T + column


@triton.jit
def _load_three(  # type: ignore[no-untyped-def]
    qkv, offset, packed, head, feature, held, NUM_HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr
):
    """Queries, keys and values (TILE, WIDTH_TILE); of no use in rows that are not ``held``."""
    width = NUM_HEADS * HEAD_WIDTH
    of_head = head * HEAD_WIDTH + feature
    at = packed * (3 * width) + of_head
    inside = feature < HEAD_WIDTH
    query = _load(qkv + at, offset + of_head, held, inside)
    key = _load(qkv + at + width, offset + of_head + width, held, inside)
    value = _load(qkv + at + 2 * width, offset + of_head + 2 * width, held, inside)
    return query, key, value, at


@triton.jit
def _load(place, offset, held, inside):  # type: ignore[no-untyped-def]
    product = tl.load(place, mask=held, other=0.0)
    lift = tl.load(offset, mask=inside, other=0.0)
    return (product.to(tl.float32) + lift.to(tl.float32)).to(product.dtype)


@triton.jit
def _weights(query, key, bias, pair, tokens, row, column, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(TILE, TILE) float32 attention of every token; rows of padding hold numbers that nobody uses."""
    real = (row < tokens) & (column < tokens)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    score += tl.load(bias + pair, mask=real, other=0.0).to(tl.float32)
    score = tl.where(column < tokens, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit(do_not_specialize=["first_molecule"])
def _forward(  # type: ignore[no-untyped-def]
    qkv,
    offset,
    bias,
    first_token,
    num_atoms,
    seed,
    output,
    first_molecule,
    T,
    dropout_probability,
    NUM_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens, row, column, feature, packed, _, head, number, place = _places(
        first_token, num_atoms, first_molecule, T, NUM_HEADS, TILE, WIDTH_TILE
    )
    square = number.to(tl.int64) * T * T
    held = (row < tokens) & (feature < HEAD_WIDTH)
    query, key, value, _ = _load_three(
        qkv, offset, packed, head, feature, held, NUM_HEADS, HEAD_WIDTH
    )
    weight = _weights(
        query, key, bias + square, place, tokens, row, column, HEAD_WIDTH**-0.5, PRECISION
    )
    if DROPS:
        survives = kept(tl.load(seed), number * T * T + place, dropout_probability)
        weight = tl.where(survives, weight / (1.0 - dropout_probability), 0.0)
    attended = tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    to = (packed * NUM_HEADS + head) * HEAD_WIDTH + feature
    tl.store(output + to, attended.to(output.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["first_molecule"])
def _backward(  # type: ignore[no-untyped-def]
    gradient,
    qkv,
    offset,
    bias,
    first_token,
    num_atoms,
    seed,
    of_qkv,
    of_offsets,
    of_bias,
    first_molecule,
    T,
    dropout_probability,
    NUM_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens, row, column, feature, packed, molecule, head, number, place = _places(
        first_token, num_atoms, first_molecule, T, NUM_HEADS, TILE, WIDTH_TILE
    )
    square = number.to(tl.int64) * T * T
    held = (row < tokens) & (feature < HEAD_WIDTH)
    query, key, value, at = _load_three(
        qkv, offset, packed, head, feature, held, NUM_HEADS, HEAD_WIDTH
    )
    scale = HEAD_WIDTH**-0.5
    weight = _weights(query, key, bias + square, place, tokens, row, column, scale, PRECISION)

    of = (packed * NUM_HEADS + head) * HEAD_WIDTH + feature
    of_output = tl.load(gradient + of, mask=held, other=0.0)
    of_weight = tl.dot(of_output, tl.trans(value), input_precision=PRECISION)
    thinned = weight
    if DROPS:
        survives = kept(tl.load(seed), number * T * T + place, dropout_probability)
        thinned = tl.where(survives, weight / (1.0 - dropout_probability), 0.0)
        of_weight = tl.where(survives, of_weight / (1.0 - dropout_probability), 0.0)
    of_value = tl.dot(tl.trans(thinned.to(value.dtype)), of_output, input_precision=PRECISION)
    # Rows of padding have gradients of 0 from here on, since `of_output` has.
    of_score = weight * (of_weight - tl.sum(of_weight * weight, 1)[:, None])

    real = (row < tokens) & (column < tokens)
    before = tl.load(of_bias + square + place, mask=real, other=0.0)
    tl.store(of_bias + square + place, before + of_score, mask=real)
    factor = (of_score * scale).to(query.dtype)
    of_query = tl.dot(factor, key, input_precision=PRECISION)
    of_key = tl.dot(tl.trans(factor), query, input_precision=PRECISION)
    width = NUM_HEADS * HEAD_WIDTH
    kind = of_qkv.dtype.element_ty
    tl.store(of_qkv + at, of_query.to(kind), mask=held)
    tl.store(of_qkv + at + width, of_key.to(kind), mask=held)
    tl.store(of_qkv + at + 2 * width, of_value.to(kind), mask=held)
    to = of_offsets + molecule.to(tl.int64) * (3 * width) + head * HEAD_WIDTH + feature
    inside = feature < HEAD_WIDTH
    tl.store(to, tl.sum(of_query, 0)[None, :], mask=inside)
    tl.store(to + width, tl.sum(of_key, 0)[None, :], mask=inside)
    tl.store(to + 2 * width, tl.sum(of_value, 0)[None, :], mask=inside)
