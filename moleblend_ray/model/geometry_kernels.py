"""Triton kernels of Gaussian densities.

The K densities of each pair are written once; the backward pass computes them again from the pair's distance.

Shape legend: R rows (atoms of a batch), N pairs of each, K densities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.fused import on_its_device

__all__ = ["gaussians_backward", "gaussians_forward"]

_PROGRAMS = 1024
"""Programs that share the rows of a backward pass. Each sums the gradients of means and widths over its rows; PyTorch
adds these sums."""

_PAIRS = 16
"""Pairs that a program holds in registers at once."""


@on_its_device
def gaussians_forward(
    value: Tensor, known: Tensor, mean: Tensor, width: Tensor, norm: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normal densities (R, N, K) in ``dtype`` of ``value`` (R, N) float32, and their sums (R, K) float32 over N.

    Densities are divided by ``norm`` times the width, and 0 where not ``known`` (R, N) bool.
    """
    rows, pairs = value.shape
    K = len(mean)
    density = torch.empty(rows, pairs, K, dtype=dtype, device=value.device)
    sums = torch.empty(rows, K, dtype=torch.float32, device=value.device)
    _gaussians[(rows,)](
        value, known, mean, width, density, sums, pairs, norm,
        K=K, K_TILE=triton.next_power_of_2(K), PAIRS=_PAIRS,
    )  # fmt: skip
    return density, sums


@on_its_device
def gaussians_backward(
    grad_density: Tensor,
    grad_sums: Tensor,
    value: Tensor,
    known: Tensor,
    mean: Tensor,
    width: Tensor,
    norm: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value`` (R, N), ``mean`` and ``width`` (K,), float32."""
    rows, pairs = value.shape
    K = len(mean)
    grad_value = torch.empty_like(value)
    programs = min(_PROGRAMS, rows)
    grad_mean_parts, grad_width_parts = torch.empty(
        2, programs, K, dtype=torch.float32, device=value.device
    )
    _gaussians_backward[(programs,)](
        grad_density, grad_sums, value, known, mean, width,
        grad_value, grad_mean_parts, grad_width_parts, rows, pairs, norm,
        K=K, K_TILE=triton.next_power_of_2(K), PAIRS=_PAIRS,
    )  # fmt: skip
    return grad_value, grad_mean_parts.sum(0), grad_width_parts.sum(0)


@triton.jit
def _densities(value, known, at, held, centre, spread, norm):  # type: ignore[no-untyped-def]
    """(PAIRS, K_TILE) standardised distances and densities, and which pairs are known."""
    x = tl.load(value + at, mask=held, other=0.0)
    is_known = tl.load(known + at, mask=held, other=0) != 0
    # A division for each kernel, and not for each element.
    narrowness = (1.0 / spread)[None, :]
    standardized = (x[:, None] - centre[None, :]) * narrowness
    # exp(-x^2 / 2) as a power of two, an instruction of its own.
    density = tl.exp2(-0.7213475204444817 * standardized * standardized) * (narrowness / norm)
    return standardized, density, is_known


@triton.jit
def _gaussians(  # type: ignore[no-untyped-def]
    value, known, mean, width, density, sums, pairs, norm,
    K: tl.constexpr, K_TILE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kernel = tl.arange(0, K_TILE)
    inside = kernel < K
    centre = tl.load(mean + kernel, mask=inside, other=0.0)
    spread = tl.load(width + kernel, mask=inside, other=1.0)
    total = tl.zeros((K_TILE,), tl.float32)
    pair = tl.arange(0, PAIRS)
    first = 0
    while first < pairs:
        at = row * pairs + first + pair
        held = first + pair < pairs
        _, result, is_known = _densities(value, known, at, held, centre, spread, norm)
        result = tl.where(is_known[:, None] & inside[None, :], result, 0.0)
        total += tl.sum(result, 0)
        to = at[:, None] * K + kernel[None, :]
        tl.store(
            density + to,
            result.to(density.dtype.element_ty),
            mask=held[:, None] & inside[None, :],
        )
        first += PAIRS
    tl.store(sums + row * K + kernel, total, mask=inside)


@triton.jit
def _gaussians_backward(  # type: ignore[no-untyped-def]
    grad_density, grad_sums, value, known, mean, width,
    grad_value, grad_mean_parts, grad_width_parts, rows, pairs, norm,
    K: tl.constexpr, K_TILE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    kernel = tl.arange(0, K_TILE)
    inside = kernel < K
    centre = tl.load(mean + kernel, mask=inside, other=0.0)
    spread = tl.load(width + kernel, mask=inside, other=1.0)
    grad_mean = tl.zeros((K_TILE,), tl.float32)
    grad_width = tl.zeros((K_TILE,), tl.float32)
    pair = tl.arange(0, PAIRS)
    row = program.to(tl.int64)
    while row < rows:
        grad_sum = tl.load(grad_sums + row * K + kernel, mask=inside, other=0.0)
        first = 0
        while first < pairs:
            at = row * pairs + first + pair
            held = first + pair < pairs
            standardized, density, is_known = _densities(
                value, known, at, held, centre, spread, norm
            )
            upstream = tl.load(
                grad_density + at[:, None] * K + kernel[None, :],
                mask=held[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            upstream = tl.where(is_known[:, None], upstream + grad_sum[None, :], 0.0)
            # d density / d mean = density * standardized / width, and the others follow from it.
            scaled = upstream * density * (1.0 / spread)[None, :]
            grad_width += tl.sum(scaled * (standardized * standardized - 1.0), 0)
            scaled *= standardized
            grad_mean += tl.sum(scaled, 0)
            tl.store(grad_value + at, -tl.sum(scaled, 1), mask=held)
            first += PAIRS
        row += tl.num_programs(0)
    to = program.to(tl.int64) * K + kernel
    tl.store(grad_mean_parts + to, grad_mean, mask=inside)
    tl.store(grad_width_parts + to, grad_width, mask=inside)
