"""Triton kernels of attention with a bias for each pair: one program computes one head of one molecule.

A molecule's tokens fit one tile, so nothing is summed in parts. Queries, keys and values are read from the packed
output of their linear map, and their gradients are written in the same layout. Scores and weights never reach memory.
All blocks add the gradient of the pair bias to one tensor in turn. The backward pass also sums the gradient of the
linear map's bias over each molecule, which saves a pass over the gradient of its output.

Rows of the pair bias have a few undefined numbers at their end, so that each begins at a multiple of 16 bytes and is
read and written in pieces of that size; single numbers, each with its address and condition, were a seventh of all
instructions.

Shape legend: B molecules, T tokens of the largest, P = :func:`row_length` of T, S real tokens packed, H heads, D width,
d = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.batch import SizeGroup
from moleblend_ray.model.dropout_kernels import kept_in_tile
from moleblend_ray.model.fused import PathScale, on_its_device

__all__ = [
    "MAX_TOKENS",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "launch_settings",
    "row_length",
]

MAX_TOKENS = 128
"""Tokens of the largest molecule whose tile fits in registers."""

_SMALLEST_TILE = 16
"""Smallest side of a tensor-core matrix product, here along the width of a head."""


_ROW_STEP = 8
"""Rows of the pair bias have a multiple of this length: 16 bytes of bfloat16. A kernel is compiled for each length."""

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def row_length(num_tokens: int) -> int:
    """Numbers in a row of the pair bias of ``num_tokens`` tokens, as the kernels expect it."""
    return -(-num_tokens // _ROW_STEP) * _ROW_STEP


@on_its_device
def attention_forward(
    qkv: Tensor,
    bias: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
    seed: Tensor,
    dropout_probability: float,
    path: PathScale | None = None,
) -> Tensor:
    """(S, D) attention of ``qkv`` (S, 3 * D) with ``bias`` (B, H, T, P), both contiguous.

    ``first_token`` and ``num_atoms`` (B,) int64: the ``num_atoms`` + 1 rows of a molecule begin at its ``first_token``.
    ``groups`` cover all molecules. ``seed`` (1,) int64 on the device decides what dropout removes. The result is multiplied
    with ``path``.
    """
    output = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    for group in groups:
        grid, constants = launch_settings(
            bias, qkv.shape[1] // 3, qkv.dtype, group, dropout_probability
        )
        _forward[grid](
            qkv, bias, first_token, num_atoms, seed, bias if path is None else path.factor, output,
            group.first, bias.shape[2], dropout_probability, SCALES=path is not None, **constants,
        )  # fmt: skip
    return output


@on_its_device
def attention_backward(
    grad_output: Tensor,
    qkv: Tensor,
    bias: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
    seed: Tensor,
    dropout_probability: float,
    path: PathScale | None,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``qkv`` (S, 3 * D) and, in float32, of a bias (3 * D,) in it, from that of the output (S, D).

    The gradient of the bias is added to ``grad_bias`` (B, H, T, P) float32; 0 is added at the end of its rows.
    """
    grad_qkv = torch.empty_like(qkv)
    grad_linear_bias_parts = torch.empty(
        len(num_atoms), qkv.shape[1], dtype=torch.float32, device=qkv.device
    )
    for group in groups:
        grid, constants = launch_settings(
            bias, qkv.shape[1] // 3, qkv.dtype, group, dropout_probability
        )
        _backward[grid](
            grad_output, qkv, bias, first_token, num_atoms, seed,
            bias if path is None else path.factor, grad_qkv, grad_linear_bias_parts, grad_bias,
            group.first, bias.shape[2], dropout_probability, SCALES=path is not None, **constants,
        )  # fmt: skip
    return grad_qkv, grad_linear_bias_parts.sum(0)


def launch_settings(
    bias: Tensor, width: int, dtype: torch.dtype, group: SizeGroup, dropout_probability: float
) -> tuple[tuple[int], dict[str, object]]:
    """Grid and constants of a kernel whose programs compute one head of one molecule of ``group``, with ``bias`` (B, H, T, P)."""
    _, num_heads, _, length = bias.shape
    tile, head_width = group.tile, width // num_heads
    return (group.molecules * num_heads,), {
        "NUM_HEADS": num_heads,
        "HEAD_WIDTH": head_width,
        "LENGTH": length,
        "TILE": tile,
        "WIDTH_TILE": max(_SMALLEST_TILE, triton.next_power_of_2(head_width)),
        "DROPS": dropout_probability > 0.0,
        # By default Triton multiplies float32 numbers as tf32, with 10 bits of mantissa.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        # With fewer, registers of the backward pass spill; with more, small tiles are slower.
        "num_warps": 16 if tile > 64 else max(1, tile // 16),
    }


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    first_token, num_atoms, first_molecule, T,
    NUM_HEADS: tl.constexpr, LENGTH: tl.constexpr, TILE: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """Which molecule and head this program computes, and where their numbers lie in memory."""
    molecule = first_molecule + tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    number = molecule * NUM_HEADS + head
    tokens = tl.load(num_atoms + molecule).to(tl.int32) + 1
    row = tl.arange(0, TILE)[:, None]
    column = tl.arange(0, TILE)[None, :]
    feature = tl.arange(0, WIDTH_TILE)[None, :]
    # Token rows of (S, 3, H, d) and (S, H, d), int64: a batch can have more than 2**31 numbers.
    packed = tl.load(first_token + molecule) + row
    # The square of pairs of this head, and places in it.
    square, place = number.to(tl.int64) * T * LENGTH, row * LENGTH + column
    return tokens, row, column, feature, packed, molecule, head, number, square, place


@triton.jit
def _load_three(  # type: ignore[no-untyped-def]
    qkv, packed, head, feature, held, NUM_HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr
):
    """Queries, keys and values (TILE, WIDTH_TILE), 0 where not ``held``, and the index of the queries."""
    width = NUM_HEADS * HEAD_WIDTH
    at = packed * (3 * width) + head * HEAD_WIDTH + feature
    query = tl.load(qkv + at, mask=held, other=0.0)
    key = tl.load(qkv + at + width, mask=held, other=0.0)
    value = tl.load(qkv + at + 2 * width, mask=held, other=0.0)
    return query, key, value, at


@triton.jit
def attention_weights(  # type: ignore[no-untyped-def]
    query, key, bias, pair, readable, tokens, column, scale, PRECISION: tl.constexpr
):
    """(TILE, TILE) float32 attention weights of each token; rows of padding are undefined.

    ``readable`` are the ``pair`` of ``bias`` that may be read: all of real tokens, and any others.
    """
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    score += tl.load(bias + pair, mask=readable, other=0.0).to(tl.float32)
    score = tl.where(column < tokens, score, float("-inf"))
    # exp2 is an instruction of its own; exp would take four.
    weight = tl.exp2((score - tl.max(score, 1)[:, None]) * _LOG2_E)
    # One division for each row: those of single elements were a sixth of all instructions.
    return weight * (1.0 / tl.sum(weight, 1))[:, None]


@triton.jit
def _kept_factor(  # type: ignore[no-untyped-def]
    seed, number, place, probability, path_scale, SCALES: tl.constexpr, DROPS: tl.constexpr
):
    """What dropout and stochastic depth multiply each weight with."""
    kept = 1.0
    if SCALES:
        kept = tl.load(path_scale)
    if DROPS:
        survives = kept_in_tile(tl.load(seed), number, place, probability)
        factor = tl.where(survives, kept * (1.0 / (1.0 - probability)), 0.0)
    else:
        factor = place.to(tl.float32) * 0.0 + kept
    return factor


@triton.jit(do_not_specialize=["first_molecule"])
def _forward(  # type: ignore[no-untyped-def]
    qkv,
    bias,
    first_token,
    num_atoms,
    seed,
    path_scale,
    output,
    first_molecule,
    T,
    dropout_probability,
    SCALES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens, row, column, feature, packed, molecule, head, number, square, place = _places(
        first_token, num_atoms, first_molecule, T, NUM_HEADS, LENGTH, TILE, WIDTH_TILE
    )
    held = (row < tokens) & (feature < HEAD_WIDTH)
    query, key, value, _ = _load_three(qkv, packed, head, feature, held, NUM_HEADS, HEAD_WIDTH)
    readable = (row < tokens) & (column < LENGTH)
    weight = attention_weights(
        query, key, bias + square, place, readable, tokens, column, HEAD_WIDTH**-0.5, PRECISION
    )
    factor = _kept_factor(
        seed, number, place, dropout_probability, path_scale + molecule, SCALES, DROPS
    )
    attended = tl.dot((weight * factor).to(value.dtype), value, input_precision=PRECISION)
    output_at = (packed * NUM_HEADS + head) * HEAD_WIDTH + feature
    tl.store(output + output_at, attended.to(output.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["first_molecule"])
def _backward(  # type: ignore[no-untyped-def]
    grad_output,
    qkv,
    bias,
    first_token,
    num_atoms,
    seed,
    path_scale,
    grad_qkv,
    grad_linear_bias_parts,
    grad_bias,
    first_molecule,
    T,
    dropout_probability,
    SCALES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens, row, column, feature, packed, molecule, head, number, square, place = _places(
        first_token, num_atoms, first_molecule, T, NUM_HEADS, LENGTH, TILE, WIDTH_TILE
    )
    held = (row < tokens) & (feature < HEAD_WIDTH)
    query, key, value, at = _load_three(qkv, packed, head, feature, held, NUM_HEADS, HEAD_WIDTH)
    scale = HEAD_WIDTH**-0.5
    readable = (row < tokens) & (column < LENGTH)
    weight = attention_weights(
        query, key, bias + square, place, readable, tokens, column, scale, PRECISION
    )

    output_at = (packed * NUM_HEADS + head) * HEAD_WIDTH + feature
    grad_attended = tl.load(grad_output + output_at, mask=held, other=0.0)
    grad_weight = tl.dot(grad_attended, tl.trans(value), input_precision=PRECISION)
    factor = _kept_factor(
        seed, number, place, dropout_probability, path_scale + molecule, SCALES, DROPS
    )
    grad_weight *= factor
    grad_value = tl.dot(
        tl.trans((weight * factor).to(value.dtype)), grad_attended, input_precision=PRECISION
    )
    # From here on gradients are 0 in rows of padding, as they are in `grad_attended`.
    grad_score = weight * (grad_weight - tl.sum(grad_weight * weight, 1)[:, None])

    before = tl.load(grad_bias + square + place, mask=readable, other=0.0)
    tl.store(grad_bias + square + place, before + grad_score, mask=readable)
    grad_product = (grad_score * scale).to(query.dtype)
    grad_query = tl.dot(grad_product, key, input_precision=PRECISION)
    grad_key = tl.dot(tl.trans(grad_product), query, input_precision=PRECISION)
    width = NUM_HEADS * HEAD_WIDTH
    dtype = grad_qkv.dtype.element_ty
    tl.store(grad_qkv + at, grad_query.to(dtype), mask=held)
    tl.store(grad_qkv + at + width, grad_key.to(dtype), mask=held)
    tl.store(grad_qkv + at + 2 * width, grad_value.to(dtype), mask=held)
    to = grad_linear_bias_parts + molecule.to(tl.int64) * (3 * width) + head * HEAD_WIDTH + feature
    inside = feature < HEAD_WIDTH
    tl.store(to, tl.sum(grad_query, 0)[None, :], mask=inside)
    # Softmax ignores what a bias of the keys adds to all scores of a row.
    tl.store(to + width, tl.zeros((1, WIDTH_TILE), tl.float32), mask=inside)
    tl.store(to + 2 * width, tl.sum(grad_value, 0)[None, :], mask=inside)
