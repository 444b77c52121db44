"""Triton kernels of what lies between the matrix products of a block: each reads its inputs once and writes its result once.

They add the biases of the linear maps, too. A backward pass that holds the gradient of such a sum in registers adds it up over
the rows there; a pass over it for this alone, as after a linear map with a bias, would read it from memory again.

Shape legend: S tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.dropout_kernels import kept
from moleblend_ray.model.fused import on_its_device

__all__ = ["add_and_norm_backward", "add_and_norm_forward", "gelu_backward", "gelu_forward"]

_PROGRAMS = 1024
"""That share the rows of a backward pass: each adds up gradients of weights, and these sums are added afterwards."""

_BLOCK = 2048

_ROWS, _COLUMNS = 8, 256
"""Of the part that the backward pass of GELU holds in registers."""


@on_its_device
def add_and_norm_forward(
    tokens: Tensor,
    product: Tensor,
    offset: Tensor,
    weight: Tensor,
    shift: Tensor,
    epsilon: float,
    molecule: Tensor,
    factor: Tensor | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``tokens`` (S, D) plus ``product`` (S, D) with ``offset`` (D,), after dropout and times the ``factor`` (B,)
    of the token's ``molecule`` (S,); and mean and reciprocal deviation of each row, (2, S) float32. In the type of ``product``."""
    output = torch.empty_like(product)
    count, width = tokens.shape
    statistics = torch.empty(2, count, dtype=torch.float32, device=tokens.device)
    _add_and_norm[(count,)](
        tokens, product, offset, weight, shift, molecule,
        tokens if factor is None else factor, molecule if seed is None else seed,
        output, statistics, count, epsilon, dropout_probability,
        **_constants(width, factor, seed),
    )  # fmt: skip
    return output, statistics


@on_its_device
def add_and_norm_backward(
    gradient: Tensor,
    tokens: Tensor,
    product: Tensor,
    offset: Tensor,
    weight: Tensor,
    statistics: Tensor,
    molecule: Tensor,
    factor: Tensor | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``tokens`` and ``product`` in their types, and of the offset and the norm's weight and shift, (3, D)
    float32."""
    count, width = tokens.shape
    of_tokens, of_product = torch.empty_like(tokens), torch.empty_like(product)
    programs = min(_PROGRAMS, count)
    sums = torch.empty(3, programs, width, dtype=torch.float32, device=tokens.device)
    _add_and_norm_backward[(programs,)](
        gradient, tokens, product, offset, weight, statistics, molecule,
        tokens if factor is None else factor, molecule if seed is None else seed,
        of_tokens, of_product, *sums.unbind(0), count, dropout_probability,
        **_constants(width, factor, seed),
    )  # fmt: skip
    return of_tokens, of_product, sums.sum(1)


def _constants(width: int, factor: Tensor | None, seed: Tensor | None) -> dict[str, object]:
    tile = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "TILE": tile,
        "SCALES": factor is not None,
        "DROPS": seed is not None,
        "num_warps": min(16, max(1, tile // 256)),
    }


@on_its_device
def gelu_forward(
    product: Tensor, offset: Tensor, seed: Tensor | None, dropout_probability: float
) -> Tensor:
    """GELU (with the error function), then dropout, of ``product`` (S, F) with ``offset`` (F,)."""
    output = torch.empty_like(product)
    count = product.numel()
    _gelu[(triton.cdiv(count, _BLOCK),)](
        product, offset, product if seed is None else seed, output, count, dropout_probability,
        WIDTH=product.shape[1], DROPS=seed is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return output


@on_its_device
def gelu_backward(
    gradient: Tensor,
    product: Tensor,
    offset: Tensor,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``product`` in its type and of ``offset`` (F,) float32."""
    of_product = torch.empty_like(product)
    count, width = product.shape
    columns = triton.cdiv(width, _COLUMNS)
    programs = min(triton.cdiv(_PROGRAMS, columns), triton.cdiv(count, _ROWS))
    sums = torch.empty(programs, width, dtype=torch.float32, device=product.device)
    _gelu_backward[(programs, columns)](
        gradient, product, offset, product if seed is None else seed,
        of_product, sums, count, dropout_probability,
        WIDTH=width, DROPS=seed is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return of_product, sums.sum(0)


@triton.jit
def _branch_scale(  # type: ignore[no-untyped-def]
    row, column, molecule, factor, seed, probability,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """What each element of the branch is multiplied with."""
    scale = column.to(tl.float32) * 0.0 + 1.0
    if SCALES:
        scale *= tl.load(factor + tl.load(molecule + row))
    if DROPS:
        survives = kept(tl.load(seed), row * WIDTH + column, probability)
        scale = tl.where(survives, scale / (1.0 - probability), 0.0)
    return scale


@triton.jit
def _add_and_norm(  # type: ignore[no-untyped-def]
    tokens, product, offset, weight, shift, molecule, factor, seed, output, statistics,
    count, epsilon, probability,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    at = row * WIDTH + column
    scale = _branch_scale(row, column, molecule, factor, seed, probability, WIDTH, SCALES, DROPS)
    total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    branch += tl.load(offset + column, mask=inside, other=0.0).to(tl.float32)
    total += scale * branch
    mean = tl.sum(total, 0) / WIDTH
    centred = tl.where(inside, total - mean, 0.0)
    rate = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + epsilon)
    result = centred * rate * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + count + row, rate)


@triton.jit
def _add_and_norm_backward(  # type: ignore[no-untyped-def]
    gradient, tokens, product, offset, weight, statistics, molecule, factor, seed,
    of_tokens, of_product, of_offsets, of_weights, of_shifts, count, probability,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    of_output_scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    lift = tl.load(offset + column, mask=inside, other=0.0).to(tl.float32)
    of_offset = tl.zeros((TILE,), tl.float32)
    of_weight = tl.zeros((TILE,), tl.float32)
    of_shift = tl.zeros((TILE,), tl.float32)
    row = program.to(tl.int64)
    while row < count:
        at = row * WIDTH + column
        scale = _branch_scale(
            row, column, molecule, factor, seed, probability, WIDTH, SCALES, DROPS
        )
        total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        total += scale * (tl.load(product + at, mask=inside, other=0.0).to(tl.float32) + lift)
        rate = tl.load(statistics + count + row)
        standard = tl.where(inside, (total - tl.load(statistics + row)) * rate, 0.0)
        upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        of_weight += upstream * standard
        of_shift += upstream
        upstream *= of_output_scale
        along = tl.sum(upstream * standard, 0) / WIDTH
        level = tl.sum(upstream, 0) / WIDTH
        result = (upstream - standard * along - level) * rate
        tl.store(of_tokens + at, result.to(of_tokens.dtype.element_ty), mask=inside)
        result *= scale
        of_offset += result
        tl.store(of_product + at, result.to(of_product.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    to = program.to(tl.int64) * WIDTH + column
    tl.store(of_offsets + to, of_offset, mask=inside)
    tl.store(of_weights + to, of_weight, mask=inside)
    tl.store(of_shifts + to, of_shift, mask=inside)


@triton.jit
def _gelu(  # type: ignore[no-untyped-def]
    product, offset, seed, output, count, probability,
    WIDTH: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(offset + at % WIDTH, mask=inside, other=0.0).to(tl.float32)
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    if DROPS:
        result = tl.where(kept(tl.load(seed), at, probability), result / (1.0 - probability), 0.0)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(  # type: ignore[no-untyped-def]
    gradient, product, offset, seed, of_product, of_offsets, count, probability,
    WIDTH: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lift = tl.load(offset + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    of_offset = tl.zeros((ROWS, COLUMNS), tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * ROWS
    while first < count:
        at = row[:, None] * WIDTH + column[None, :]
        inside = (row < count)[:, None] & (column < WIDTH)[None, :]
        value = tl.load(product + at, mask=inside, other=0.0).to(tl.float32) + lift[None, :]
        upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        # The normal distribution and its density: d (x * distribution) / dx.
        distribution = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        density = tl.exp(-0.5 * value * value) * 0.3989422804014327
        result = upstream * (distribution + value * density)
        if DROPS:
            survives = kept(tl.load(seed), at, probability)
            result = tl.where(survives, result / (1.0 - probability), 0.0)
        of_offset += result
        tl.store(of_product + at, result.to(of_product.dtype.element_ty), mask=inside)
        row += tl.num_programs(0) * ROWS
        first += tl.num_programs(0) * ROWS
    to = tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(of_offsets + to, tl.sum(of_offset, 0), mask=column < WIDTH)
