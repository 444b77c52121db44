"""Triton kernels of the token embedding.

The forward pass adds up the table rows that each token shows, normalises the sum and writes it. The backward pass of
the normalisation gives the gradient of each sum; the gradient of a table row is the sum over all tokens that read it.
As in `pair_bias_kernels.py`, these sums are matrix products with marks, in a fixed order.

Shape legend: B molecules, N atoms (padded), A real atoms packed, S = A + B tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.blending import AtomFeature
from moleblend_ray.model.block_kernels import gradient_through_norm
from moleblend_ray.model.fused import on_its_device

__all__ = ["TokenRelations", "embed_backward", "embed_forward"]

_PROGRAMS = 1024
"""Programs that share the tokens in the backward pass of the normalisation."""

_PARTS, _COLUMNS, _TOKENS = 44, 64, 32
"""In the backward pass of the tables: programs that share the tokens for each part of the width (with the 12 parts of the
preset ``base``, four programs for each multiprocessor of an H100), columns of a part, tokens read at once."""

_WARPS_TABLES = 8

_SMALLEST_TILE = 16
"""Smallest side of a tensor-core matrix product."""

_DEGREE: tl.constexpr = tl.constexpr(1 << AtomFeature.DEGREE)
_GEOMETRY: tl.constexpr = tl.constexpr(1 << AtomFeature.GEOMETRY)


class TokenRelations(NamedTuple):
    """What each token reads."""

    features: Tensor
    """(B, N, F) uint8, codes of the categories of an atom."""
    degrees: Tensor
    """(B, N) uint8; those beyond the table read its last row."""
    shown: Tensor
    """(B, N) uint8, with a bit for each :class:`AtomFeature`."""
    molecule: Tensor
    """(S,) int64, molecule of each token."""
    first_token: Tensor
    """(B,) int64, number of each molecule's graph token, the first of its tokens."""
    offsets: Tensor
    """(F,) int64, first row of each category in the table."""


@on_its_device
def embed_forward(
    categories: Tensor,
    degree: Tensor,
    graph_token: Tensor,
    merged: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    merged_scale: float,
    relations: TokenRelations,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of the embedded tokens, these tokens themselves, both (S, D) in ``dtype``, and statistics of each row.

    A token is the ``graph_token`` (1, D), or the sum of an atom's rows of ``categories`` (rows, D) and of what it shows:
    its row of ``degree`` (rows, D), and its row of ``merged`` (A, D) times ``merged_scale``. The statistics, (2, S)
    float32, are mean and reciprocal standard deviation.
    """
    count, width = len(relations.molecule), merged.shape[1]
    output = torch.empty(count, width, dtype=dtype, device=merged.device)
    embedded = torch.empty_like(output)
    statistics = torch.empty(2, count, dtype=torch.float32, device=merged.device)
    _embed[(count,)](
        *relations, categories, degree, graph_token, merged.contiguous(), norm_weight, norm_bias,
        embedded, output, statistics, relations.shown.shape[1], count, epsilon, merged_scale,
        NUM_FEATURES=relations.features.shape[-1], NUM_DEGREES=len(degree), **_row(width),
    )  # fmt: skip
    return output, embedded, statistics


@on_its_device
def embed_backward(
    grad_output: Tensor,
    embedded: Tensor,
    norm_weight: Tensor,
    statistics: Tensor,
    merged_scale: float,
    relations: TokenRelations,
    *,
    num_rows: tuple[int, int],
    merged_type: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of ``categories``, ``degree``, ``graph_token``, ``merged``, norm weight and norm bias.

    That of ``merged`` is in ``merged_type``, the others are float32. ``num_rows`` are the numbers of rows of the first
    two tables.
    """
    count, width = embedded.shape
    device, N = embedded.device, relations.shown.shape[1]
    grad_embedded = torch.empty_like(embedded)
    num_atoms = count - len(relations.first_token)
    grad_merged = torch.empty(num_atoms, width, dtype=merged_type, device=device)
    programs = min(_PROGRAMS, count)
    norm_parts = torch.empty(2, programs, width, dtype=torch.float32, device=device)
    _norm_backward[(programs,)](
        grad_output, embedded, norm_weight, statistics, *relations[2:5], grad_embedded, grad_merged,
        *norm_parts.unbind(0), N, count, merged_scale, **_row(width),
    )  # fmt: skip
    rows, parts = sum(num_rows) + 1, min(_PARTS, triton.cdiv(count, _TOKENS))
    table_parts = torch.empty(parts, rows, width, dtype=torch.float32, device=device)
    _tables_backward[(parts, triton.cdiv(width, _COLUMNS))](
        grad_embedded, *relations, table_parts, N, count,
        NUM_FEATURES=relations.features.shape[-1], NUM_CATEGORIES=num_rows[0], NUM_DEGREES=num_rows[1],
        ROW_TILE=max(_SMALLEST_TILE, triton.next_power_of_2(rows)), WIDTH=width, COLUMNS=_COLUMNS, TOKENS=_TOKENS,
        # Marks, 0 and 1, lose nothing as tf32, nor does bfloat16; three products make up for float32.
        PRECISION="tf32x3" if embedded.dtype == torch.float32 else "tf32",
        num_warps=_WARPS_TABLES,
    )  # fmt: skip
    tables = torch.split(table_parts.sum(0), [*num_rows, 1])
    return *tables, grad_merged, *norm_parts.sum(1).unbind(0)


def _row(width: int) -> dict[str, int]:
    tile = triton.next_power_of_2(width)
    return {"WIDTH": width, "TILE": tile, "num_warps": min(16, max(1, tile // 256))}


# These tensors of a batch lie in one buffer, so their alignment changes with its sizes.
_UNALIGNED = ["features", "degrees", "shown", "molecule", "first_token"]


@triton.jit
def _place(token, exists, molecule, first_token, N):  # type: ignore[no-untyped-def]
    """The molecule of a token, and its atom's rank within it and index in (B * N); the graph token has rank -1."""
    owner = tl.load(molecule + token, mask=exists, other=0)
    rank = token - tl.load(first_token + owner, mask=exists, other=0) - 1
    return owner, rank, owner * N + rank


@triton.jit(do_not_specialize=["N", "count"], do_not_specialize_on_alignment=_UNALIGNED)
def _embed(  # type: ignore[no-untyped-def]
    features, degrees, shown, molecule, first_token, offsets,
    categories, degree, graph_token, merged, norm_weight, norm_bias,
    embedded, output, statistics, N, count, epsilon, merged_scale,
    NUM_FEATURES: tl.constexpr, NUM_DEGREES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    owner, rank, atom = _place(row, True, molecule, first_token, N)
    is_atom = rank >= 0
    total = tl.load(graph_token + column, mask=inside & (rank < 0), other=0.0).to(tl.float32)
    for feature in tl.static_range(NUM_FEATURES):
        code = tl.load(features + atom * NUM_FEATURES + feature, mask=is_atom, other=0).to(tl.int64)
        at = (code + tl.load(offsets + feature)) * WIDTH + column
        total += tl.load(categories + at, mask=inside & is_atom, other=0.0).to(tl.float32)
    visible = tl.load(shown + atom, mask=is_atom, other=0).to(tl.int32)
    level = tl.load(degrees + atom, mask=is_atom, other=0).to(tl.int32)
    at = tl.minimum(level, NUM_DEGREES - 1) * WIDTH + column
    total += tl.load(degree + at, mask=inside & ((visible & _DEGREE) != 0), other=0.0).to(
        tl.float32
    )
    # Before an atom there are the graph tokens of its own and of all earlier molecules.
    at = (row - owner - 1) * WIDTH + column
    near = tl.load(merged + at, mask=inside & ((visible & _GEOMETRY) != 0), other=0.0)
    total += merged_scale * near.to(tl.float32)
    tl.store(embedded + row * WIDTH + column, total.to(embedded.dtype.element_ty), mask=inside)
    mean = tl.sum(total, 0) / WIDTH
    centred = tl.where(inside, total - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + epsilon)
    result = centred * rstd * tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + column, result.to(output.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + count + row, rstd)


@triton.jit(do_not_specialize=["N", "count"], do_not_specialize_on_alignment=_UNALIGNED)
def _norm_backward(  # type: ignore[no-untyped-def]
    grad_output, embedded, norm_weight, statistics, shown, molecule, first_token,
    grad_embedded, grad_merged, grad_norm_weight_parts, grad_norm_bias_parts, N, count, merged_scale,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_norm_weight = tl.zeros((TILE,), tl.float32)
    grad_norm_bias = tl.zeros((TILE,), tl.float32)
    row = program.to(tl.int64)
    while row < count:
        at = row * WIDTH + column
        rstd = tl.load(statistics + count + row)
        centred = tl.load(embedded + at, mask=inside, other=0.0).to(tl.float32)
        centred -= tl.load(statistics + row)
        normalized = tl.where(inside, centred * rstd, 0.0)
        upstream = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
        grad_norm_weight += upstream * normalized
        grad_norm_bias += upstream
        result = gradient_through_norm(upstream, normalized, weight, rstd, WIDTH)
        tl.store(grad_embedded + at, result.to(grad_embedded.dtype.element_ty), mask=inside)
        owner, rank, atom = _place(row, True, molecule, first_token, N)
        visible = tl.load(shown + atom, mask=rank >= 0, other=0).to(tl.int32)
        result = tl.where((visible & _GEOMETRY) != 0, result * merged_scale, 0.0)
        to = (row - owner - 1) * WIDTH + column
        result = result.to(grad_merged.dtype.element_ty)
        tl.store(grad_merged + to, result, mask=inside & (rank >= 0))
        row += tl.num_programs(0)
    to = program.to(tl.int64) * WIDTH + column
    tl.store(grad_norm_weight_parts + to, grad_norm_weight, mask=inside)
    tl.store(grad_norm_bias_parts + to, grad_norm_bias, mask=inside)


@triton.jit(do_not_specialize=["N", "count"], do_not_specialize_on_alignment=_UNALIGNED)
def _tables_backward(  # type: ignore[no-untyped-def]
    grad_embedded, features, degrees, shown, molecule, first_token, offsets, grad_table_parts, N, count,
    NUM_FEATURES: tl.constexpr, NUM_CATEGORIES: tl.constexpr, NUM_DEGREES: tl.constexpr,
    ROW_TILE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of the result: categories, degrees, graph token."""
    part = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    code = tl.arange(0, ROW_TILE)[:, None]
    total = tl.zeros((ROW_TILE, COLUMNS), tl.float32)
    first = part * TOKENS
    while first < count:
        token = first + tl.arange(0, TOKENS)[None, :]
        exists = token < count
        _, rank, atom = _place(token, exists, molecule, first_token, N)
        is_atom = exists & (rank >= 0)
        marks = ((code == NUM_CATEGORIES + NUM_DEGREES) & exists & (rank < 0)).to(tl.float32)
        for feature in tl.static_range(NUM_FEATURES):
            read = tl.load(features + atom * NUM_FEATURES + feature, mask=is_atom, other=0)
            read = read.to(tl.int32) + tl.load(offsets + feature).to(tl.int32)
            marks += ((code == read) & is_atom).to(tl.float32)
        visible = tl.load(shown + atom, mask=is_atom, other=0).to(tl.int32)
        level = tl.load(degrees + atom, mask=is_atom, other=0).to(tl.int32)
        read = NUM_CATEGORIES + tl.minimum(level, NUM_DEGREES - 1)
        marks += ((code == read) & ((visible & _DEGREE) != 0)).to(tl.float32)
        place = first + tl.arange(0, TOKENS)[:, None]
        upstream = tl.load(
            grad_embedded + place * WIDTH + column,
            mask=(place < count) & (column < WIDTH),
            other=0.0,
        )
        total = tl.dot(marks, upstream.to(tl.float32), acc=total, input_precision=PRECISION)
        first += tl.num_programs(0) * TOKENS
    rows = NUM_CATEGORIES + NUM_DEGREES + 1
    to = (part * rows + code) * WIDTH + column
    tl.store(grad_table_parts + to, total, mask=(code < rows) & (column < WIDTH))
