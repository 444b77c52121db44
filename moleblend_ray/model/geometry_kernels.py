"""Triton kernels of Gaussian densities: the K numbers of each pair are written once, and their derivatives computed from the
pair's distance again.

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
"""That share the rows of a backward pass: each adds up gradients of means and widths, and these sums are added afterwards."""

_PAIRS = 16
"""In registers at once."""


@on_its_device
def gaussians_forward(
    value: Tensor, known: Tensor, mean: Tensor, width: Tensor, norm: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normal densities (R, N, K) in ``dtype`` of ``value`` (R, N) float32, 0 where not ``known`` (R, N) bool, and their sums
    (R, K) float32 over the pairs of each row; ``norm`` times the width divides them."""
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
    of_density: Tensor,
    of_sums: Tensor,
    value: Tensor,
    known: Tensor,
    mean: Tensor,
    width: Tensor,
    norm: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value`` (R, N), ``mean`` and ``width`` (K,), float32."""
    rows, pairs = value.shape
    K = len(mean)
    of_value = torch.empty_like(value)
    programs = min(_PROGRAMS, rows)
    of_mean, of_width = torch.empty(2, programs, K, dtype=torch.float32, device=value.device)
    _gaussians_backward[(programs,)](
        of_density, of_sums, value, known, mean, width, of_value, of_mean, of_width, rows, pairs, norm,
        K=K, K_TILE=triton.next_power_of_2(K), PAIRS=_PAIRS,
    )  # fmt: skip
    return of_value, of_mean.sum(0), of_width.sum(0)


@triton.jit
def _densities(value, known, at, held, centre, spread, norm):  # type: ignore[no-untyped-def]
    """(PAIRS, K_TILE) standardised distances and densities, and which pairs are known."""
    x = tl.load(value + at, mask=held, other=0.0)
    is_known = tl.load(known + at, mask=held, other=0) != 0
    standard = (x[:, None] - centre[None, :]) / spread[None, :]
    density = tl.exp(-0.5 * standard * standard) / (norm * spread[None, :])
    return standard, density, is_known


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
    of_density, of_sums, value, known, mean, width, of_value, of_mean, of_width, rows, pairs, norm,
    K: tl.constexpr, K_TILE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    kernel = tl.arange(0, K_TILE)
    inside = kernel < K
    centre = tl.load(mean + kernel, mask=inside, other=0.0)
    spread = tl.load(width + kernel, mask=inside, other=1.0)
    mean_sum = tl.zeros((K_TILE,), tl.float32)
    width_sum = tl.zeros((K_TILE,), tl.float32)
    pair = tl.arange(0, PAIRS)
    row = program.to(tl.int64)
    while row < rows:
        of_row = tl.load(of_sums + row * K + kernel, mask=inside, other=0.0)
        first = 0
        while first < pairs:
            at = row * pairs + first + pair
            held = first + pair < pairs
            standard, density, is_known = _densities(value, known, at, held, centre, spread, norm)
            upstream = tl.load(
                of_density + at[:, None] * K + kernel[None, :],
                mask=held[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            upstream = tl.where(is_known[:, None], upstream + of_row[None, :], 0.0)
            # d density / d mean = density * standard / width, and the others follow from it.
            scaled = upstream * density / spread[None, :]
            width_sum += tl.sum(scaled * (standard * standard - 1.0), 0)
            scaled *= standard
            mean_sum += tl.sum(scaled, 0)
            tl.store(of_value + at, -tl.sum(scaled, 1), mask=held)
            first += PAIRS
        row += tl.num_programs(0)
    to = program.to(tl.int64) * K + kernel
    tl.store(of_mean + to, mean_sum, mask=inside)
    tl.store(of_width + to, width_sum, mask=inside)
