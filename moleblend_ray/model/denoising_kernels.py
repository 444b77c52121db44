"""Triton kernels of the denoising head: one program computes one head of one molecule, as in attention.

Scores, weights and their products with the displacements never reach memory. Each program writes what its head adds to
the prediction; PyTorch sums over heads.

Shape legend: B molecules, N atoms of the largest, T = N + 1 tokens, P the length of their rows in the bias, A real atoms
packed, H heads, D width, d = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.attention_kernels import attention_weights, launch_settings
from moleblend_ray.model.batch import SizeGroup
from moleblend_ray.model.dropout_kernels import kept_in_tile
from moleblend_ray.model.fused import on_its_device

__all__ = ["denoising_backward", "denoising_forward"]

_AXES: tl.constexpr = tl.constexpr(3)


@on_its_device
def denoising_forward(
    mapped: Tensor,
    bias: Tensor,
    displacement: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
    seed: Tensor,
    dropout_probability: float,
) -> Tensor:
    """(A, 3) float32: sums over heads and atoms b of ``attention[h, a, b] displacement[a, b] value[b, h]``, axis by axis.

    ``mapped`` (A, 2 * D + 3 * H), contiguous, has queries, keys and values of each atom; ``bias`` is (B, H, T, P),
    ``displacement`` (B, N, N, 3) float32. ``first_token``, ``num_atoms``, ``groups`` and ``seed`` are as in
    :func:`~moleblend_ray.model.attention_kernels.attention_forward`.
    """
    H = bias.shape[1]
    parts = torch.empty(H, len(mapped), 3, dtype=torch.float32, device=mapped.device)
    for group in groups:
        grid, constants = _launch_settings(mapped, bias, group, dropout_probability)
        _forward[grid](
            mapped, bias, displacement.contiguous(), first_token, num_atoms, seed, parts,
            group.first, bias.shape[2], len(mapped), dropout_probability, **constants,
        )  # fmt: skip
    return parts.sum(0)


@on_its_device
def denoising_backward(
    grad_output: Tensor,
    mapped: Tensor,
    bias: Tensor,
    displacement: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
    seed: Tensor,
    dropout_probability: float,
    grad_bias: Tensor,
) -> Tensor:
    """Gradient of ``mapped``, from that of the output (A, 3) float32.

    The gradient of the bias is added to ``grad_bias`` (B, H, T, P) float32.
    """
    grad_mapped = torch.empty_like(mapped)
    for group in groups:
        grid, constants = _launch_settings(mapped, bias, group, dropout_probability)
        _backward[grid](
            grad_output, mapped, bias, displacement.contiguous(), first_token, num_atoms, seed,
            grad_mapped, grad_bias, group.first, bias.shape[2], dropout_probability, **constants,
        )  # fmt: skip
    return grad_mapped


def _launch_settings(
    mapped: Tensor, bias: Tensor, group: SizeGroup, dropout_probability: float
) -> tuple[tuple[int], dict[str, object]]:
    width = (mapped.shape[1] - 3 * bias.shape[1]) // 2
    grid, constants = launch_settings(bias, width, mapped.dtype, group, dropout_probability)
    if group.tile == 64:
        # With fewer, registers of the backward pass spill: three displacements for each pair are at hand at once.
        constants["num_warps"] = 8
    return grid, constants


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    first_token, num_atoms, first_molecule, T,
    NUM_HEADS: tl.constexpr, LENGTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Which molecule and head this program computes, and where their numbers lie in memory."""
    molecule = first_molecule + tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    number = molecule * NUM_HEADS + head
    atoms = tl.load(num_atoms + molecule).to(tl.int32)
    row = tl.arange(0, TILE)[:, None]
    column = tl.arange(0, TILE)[None, :]
    # Tokens are atoms and one graph token for each molecule. int64: a batch can have more than 2**31 numbers.
    first = tl.load(first_token + molecule) - molecule
    # Pairs in (B, H, T, P), without the graph token, and in (B, N, N, 3).
    pair = number.to(tl.int64) * T * LENGTH + (row + 1) * LENGTH + column + 1
    vector = (molecule.to(tl.int64) * (T - 1) * (T - 1) + row * (T - 1) + column) * _AXES
    return atoms, row, column, first, head, number, pair, vector


@triton.jit
def _queries_and_keys(  # type: ignore[no-untyped-def]
    mapped, first, row, head, atoms,
    NUM_HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """Queries and keys (TILE, WIDTH_TILE), 0 in padding; the index of the queries, and which are held."""
    width = NUM_HEADS * HEAD_WIDTH
    feature = tl.arange(0, WIDTH_TILE)[None, :]
    held = (row < atoms) & (feature < HEAD_WIDTH)
    at = (first + row) * (2 * width + _AXES * NUM_HEADS) + head * HEAD_WIDTH + feature
    query = tl.load(mapped + at, mask=held, other=0.0)
    key = tl.load(mapped + at + width, mask=held, other=0.0)
    return query, key, at, held


@triton.jit(do_not_specialize=["first_molecule"])
def _forward(  # type: ignore[no-untyped-def]
    mapped, bias, displacement, first_token, num_atoms, seed, parts,
    first_molecule, T, count, dropout_probability,
    NUM_HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, LENGTH: tl.constexpr, TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    atoms, row, column, first, head, number, pair, vector = _places(
        first_token, num_atoms, first_molecule, T, NUM_HEADS, LENGTH, TILE
    )
    query, key, _, _ = _queries_and_keys(
        mapped, first, row, head, atoms, NUM_HEADS, HEAD_WIDTH, WIDTH_TILE
    )
    real = (row < atoms) & (column < atoms)
    weight = attention_weights(
        query, key, bias, pair, real, atoms, column, HEAD_WIDTH**-0.5, PRECISION
    )
    if DROPS:
        survives = kept_in_tile(tl.load(seed), number, row * TILE + column, dropout_probability)
        weight = tl.where(survives, weight * (1.0 / (1.0 - dropout_probability)), 0.0)
    stride = 2 * NUM_HEADS * HEAD_WIDTH + _AXES * NUM_HEADS
    values = (first + column) * stride + 2 * NUM_HEADS * HEAD_WIDTH + head * _AXES
    to = (head.to(tl.int64) * count + first + row) * _AXES
    for axis in range(3):
        value = tl.load(mapped + values + axis, mask=column < atoms, other=0.0).to(tl.float32)
        along = tl.load(displacement + vector + axis, mask=real, other=0.0)
        moved = tl.sum(weight * along * value, 1)[:, None]
        tl.store(parts + to + axis, moved, mask=row < atoms)


@triton.jit(do_not_specialize=["first_molecule"])
def _backward(  # type: ignore[no-untyped-def]
    grad_output, mapped, bias, displacement, first_token, num_atoms, seed, grad_mapped, grad_bias,
    first_molecule, T, dropout_probability,
    NUM_HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, LENGTH: tl.constexpr, TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    atoms, row, column, first, head, number, pair, vector = _places(
        first_token, num_atoms, first_molecule, T, NUM_HEADS, LENGTH, TILE
    )
    query, key, at, held = _queries_and_keys(
        mapped, first, row, head, atoms, NUM_HEADS, HEAD_WIDTH, WIDTH_TILE
    )
    scale = HEAD_WIDTH**-0.5
    real = (row < atoms) & (column < atoms)
    weight = attention_weights(query, key, bias, pair, real, atoms, column, scale, PRECISION)
    kept_weight = weight
    factor = column.to(tl.float32) * 0.0 + row.to(tl.float32) * 0.0 + 1.0
    if DROPS:
        survives = kept_in_tile(tl.load(seed), number, row * TILE + column, dropout_probability)
        factor = tl.where(survives, 1.0 / (1.0 - dropout_probability), 0.0)
        kept_weight = weight * factor
    width = NUM_HEADS * HEAD_WIDTH
    values = (first + column) * (2 * width + _AXES * NUM_HEADS) + 2 * width + head * _AXES
    dtype = grad_mapped.dtype.element_ty
    grad_weight = tl.zeros((TILE, TILE), tl.float32)
    for axis in range(3):
        value = tl.load(mapped + values + axis, mask=column < atoms, other=0.0).to(tl.float32)
        along = tl.load(displacement + vector + axis, mask=real, other=0.0)
        upstream = tl.load(grad_output + (first + row) * _AXES + axis, mask=row < atoms, other=0.0)
        along *= upstream
        grad_weight += along * value
        grad_value = tl.sum(kept_weight * along, 0)[None, :]
        tl.store(grad_mapped + values + axis, grad_value.to(dtype), mask=column < atoms)
    grad_weight *= factor
    # From here on gradients are 0 in rows of padding, as they are in `along`.
    grad_score = weight * (grad_weight - tl.sum(grad_weight * weight, 1)[:, None])
    before = tl.load(grad_bias + pair, mask=real, other=0.0)
    tl.store(grad_bias + pair, before + grad_score, mask=real)
    grad_product = (grad_score * scale).to(query.dtype)
    grad_query = tl.dot(grad_product, key, input_precision=PRECISION)
    grad_key = tl.dot(tl.trans(grad_product), query, input_precision=PRECISION)
    tl.store(grad_mapped + at, grad_query.to(dtype), mask=held)
    tl.store(grad_mapped + at + width, grad_key.to(dtype), mask=held)
