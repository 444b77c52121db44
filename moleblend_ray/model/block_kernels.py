"""Triton kernels of what lies between the matrix products of a block: each reads its inputs once and writes its result once.

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


@on_its_device
def add_and_norm_forward(
    tokens: Tensor,
    branch: Tensor,
    weight: Tensor,
    shift: Tensor,
    epsilon: float,
    molecule: Tensor,
    factor: Tensor | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``tokens`` (S, D) plus ``branch`` (S, D) after dropout and times the ``factor`` (B,) of the token's
    ``molecule`` (S,); and mean and reciprocal deviation of each row, (2, S) float32. In the type of ``branch``."""
    output = torch.empty_like(branch)
    count, width = tokens.shape
    statistics = torch.empty(2, count, dtype=torch.float32, device=tokens.device)
    _add_and_norm[(count,)](
        tokens, branch, weight, shift, molecule,
        tokens if factor is None else factor, molecule if seed is None else seed,
        output, statistics, count, epsilon, dropout_probability,
        **_constants(width, factor, seed),
    )  # fmt: skip
    return output, statistics


@on_its_device
def add_and_norm_backward(
    gradient: Tensor,
    tokens: Tensor,
    branch: Tensor,
    weight: Tensor,
    statistics: Tensor,
    molecule: Tensor,
    factor: Tensor | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``tokens`` and ``branch`` in their types, and of the norm's weight and shift, (D,) float32."""
    count, width = tokens.shape
    of_tokens, of_branch = torch.empty_like(tokens), torch.empty_like(branch)
    programs = min(_PROGRAMS, count)
    of_weights = torch.empty(2, programs, width, dtype=torch.float32, device=tokens.device)
    of_weight, of_shift = of_weights.unbind(0)
    _add_and_norm_backward[(programs,)](
        gradient, tokens, branch, weight, statistics, molecule,
        tokens if factor is None else factor, molecule if seed is None else seed,
        of_tokens, of_branch, of_weight, of_shift, count, dropout_probability,
        **_constants(width, factor, seed),
    )  # fmt: skip
    return of_tokens, of_branch, of_weight.sum(0), of_shift.sum(0)


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
def gelu_forward(hidden: Tensor, seed: Tensor | None, dropout_probability: float) -> Tensor:
    """GELU (with the error function), then dropout, of ``hidden`` (S, F)."""
    output = torch.empty_like(hidden)
    count = hidden.numel()
    _gelu[(triton.cdiv(count, _BLOCK),)](
        hidden, hidden if seed is None else seed, output, count, dropout_probability,
        DROPS=seed is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return output


@on_its_device
def gelu_backward(
    gradient: Tensor, hidden: Tensor, seed: Tensor | None, dropout_probability: float
) -> Tensor:
    """Gradient of ``hidden``."""
    of_hidden = torch.empty_like(hidden)
    count = hidden.numel()
    _gelu_backward[(triton.cdiv(count, _BLOCK),)](
        gradient, hidden, hidden if seed is None else seed, of_hidden, count, dropout_probability,
        DROPS=seed is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return of_hidden


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
    tokens, branch, weight, shift, molecule, factor, seed, output, statistics,
    count, epsilon, probability,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    at = row * WIDTH + column
    scale = _branch_scale(row, column, molecule, factor, seed, probability, WIDTH, SCALES, DROPS)
    total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
    total += scale * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
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
    gradient, tokens, branch, weight, statistics, molecule, factor, seed,
    of_tokens, of_branch, of_weights, of_shifts, count, probability,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    of_output_scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((TILE,), tl.float32)
    of_shift = tl.zeros((TILE,), tl.float32)
    row = program.to(tl.int64)
    while row < count:
        at = row * WIDTH + column
        scale = _branch_scale(
            row, column, molecule, factor, seed, probability, WIDTH, SCALES, DROPS
        )
        total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        total += scale * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
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
        tl.store(of_branch + at, (result * scale).to(of_branch.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    to = program.to(tl.int64) * WIDTH + column
    tl.store(of_weights + to, of_weight, mask=inside)
    tl.store(of_shifts + to, of_shift, mask=inside)


@triton.jit
def _gelu(hidden, seed, output, count, probability, DROPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    if DROPS:
        result = tl.where(kept(tl.load(seed), at, probability), result / (1.0 - probability), 0.0)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(  # type: ignore[no-untyped-def]
    gradient, hidden, seed, of_hidden, count, probability, DROPS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    # The normal distribution and its density: d (x * distribution) / dx.
    distribution = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    density = tl.exp(-0.5 * value * value) * 0.3989422804014327
    result = upstream * (distribution + value * density)
    if DROPS:
        result = tl.where(kept(tl.load(seed), at, probability), result / (1.0 - probability), 0.0)
    tl.store(of_hidden + at, result.to(of_hidden.dtype.element_ty), mask=inside)
