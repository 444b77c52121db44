"""Triton kernels of the steps between the matrix products of a block: each reads its inputs and writes its result once.

They also add the biases of the linear maps. The backward pass of a kernel has the gradient of that sum in registers and
adds it up over the rows there; a linear map with a bias would read it from memory again for this.

Shape legend: S tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.dropout_kernels import kept_in_tile
from moleblend_ray.model.fused import PathScale, on_its_device

__all__ = [
    "add_and_norm_backward",
    "add_and_norm_forward",
    "gelu_backward",
    "gelu_forward",
    "gradient_through_norm",
]

_PROGRAMS = 1024
"""Programs that share the rows of a backward pass. Each sums the gradients of weights over its rows; PyTorch adds these
sums."""

_ROWS, _COLUMNS = 8, 256
"""Rows and columns that a program of GELU holds in registers."""


@on_its_device
def add_and_norm_forward(
    tokens: Tensor,
    product: Tensor,
    linear_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    path: PathScale | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``tokens`` (S, D) plus a branch, in the type of ``product``, and statistics of each row.

    The branch is ``product`` (S, D) plus ``path`` times ``linear_bias`` (D,), after dropout. The statistics, (2, S) float32,
    are mean and reciprocal standard deviation.
    """
    output = torch.empty_like(product)
    count, width = tokens.shape
    statistics = torch.empty(2, count, dtype=torch.float32, device=tokens.device)
    _add_and_norm[(count,)](
        tokens, product, linear_bias, norm_weight, norm_bias, *_pointers(tokens, path, seed),
        output, statistics, count, epsilon, dropout_probability, **_constants(width, path, seed),
    )  # fmt: skip
    return output, statistics


@on_its_device
def add_and_norm_backward(
    grad_output: Tensor,
    tokens: Tensor,
    product: Tensor,
    linear_bias: Tensor,
    norm_weight: Tensor,
    statistics: Tensor,
    path: PathScale | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``tokens`` and ``product`` in their types, and of linear bias, norm weight and norm bias, (3, D)
    float32.

    Without dropout the first two are equal, and one tensor if the types are.
    """
    count, width = tokens.shape
    grad_tokens = torch.empty_like(tokens)
    same = seed is None and tokens.dtype == product.dtype
    grad_product = grad_tokens if same else torch.empty_like(product)
    programs = min(_PROGRAMS, count)
    sums = torch.empty(3, programs, width, dtype=torch.float32, device=tokens.device)
    _add_and_norm_backward[(programs,)](
        grad_output, tokens, product, linear_bias, norm_weight, statistics,
        *_pointers(tokens, path, seed), grad_tokens, grad_product, *sums.unbind(0), count,
        dropout_probability, SAME=same, **_constants(width, path, seed),
    )  # fmt: skip
    return grad_tokens, grad_product, sums.sum(1)


def _pointers(
    values: Tensor, path: PathScale | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Molecules of tokens, path scales and seed; ``values`` in place of those that there are not, which no kernel reads."""
    factor, molecule = (values, values) if path is None else path
    return molecule, factor, values if seed is None else seed


def _constants(width: int, path: PathScale | None, seed: Tensor | None) -> dict[str, object]:
    tile = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "TILE": tile,
        "SCALES": path is not None,
        "DROPS": seed is not None,
        "num_warps": min(16, max(1, tile // 256)),
    }


@on_its_device
def gelu_forward(
    product: Tensor,
    linear_bias: Tensor,
    path: PathScale | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> Tensor:
    """Exact GELU (by the error function) of ``product`` (S, F) plus ``linear_bias`` (F,), then dropout, times ``path``."""
    output = torch.empty_like(product)
    count, width = product.shape
    _gelu[(triton.cdiv(count, _ROWS), triton.cdiv(width, _COLUMNS))](
        product, linear_bias, *_pointers(product, path, seed), output, count, dropout_probability,
        **_tile_constants(width, path, seed),
    )  # fmt: skip
    return output


@on_its_device
def gelu_backward(
    grad_output: Tensor,
    product: Tensor,
    linear_bias: Tensor,
    path: PathScale | None,
    seed: Tensor | None,
    dropout_probability: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``product`` in its type and of ``linear_bias`` (F,) float32."""
    grad_product = torch.empty_like(product)
    count, width = product.shape
    columns = triton.cdiv(width, _COLUMNS)
    programs = min(triton.cdiv(_PROGRAMS, columns), triton.cdiv(count, _ROWS))
    sums = torch.empty(programs, width, dtype=torch.float32, device=product.device)
    _gelu_backward[(programs, columns)](
        grad_output, product, linear_bias, *_pointers(product, path, seed),
        grad_product, sums, count, dropout_probability, **_tile_constants(width, path, seed),
    )  # fmt: skip
    return grad_product, sums.sum(0)


def _tile_constants(width: int, path: PathScale | None, seed: Tensor | None) -> dict[str, object]:
    return {
        "WIDTH": width,
        "SCALES": path is not None,
        "DROPS": seed is not None,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "num_warps": 4,
    }


@triton.jit
def _kept_factor(seed, row, column, probability, DROPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What dropout multiplies each element with: 0 or 1 / (1 - probability)."""
    factor = row.to(tl.float32) * 0.0 + column.to(tl.float32) * 0.0 + 1.0
    if DROPS:
        survives = kept_in_tile(tl.load(seed), row, column, probability)
        factor = tl.where(survives, 1.0 / (1.0 - probability), 0.0)
    return factor


@triton.jit
def _path_factor(molecule, path_scale, row, inside, SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """What stochastic depth multiplies the ``row`` with; anything where it is not ``inside``."""
    factor = row.to(tl.float32) * 0.0 + 1.0
    if SCALES:
        factor = tl.load(path_scale + tl.load(molecule + row, mask=inside, other=0))
    return factor


@triton.jit
def gradient_through_norm(upstream, normalized, weight, rstd, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of a row before LayerNorm, from its ``normalized`` values and the gradient ``upstream`` of the result."""
    grad_normalized = upstream * weight
    # Mean and deviation are functions of the row, too: the parts of the gradient through them are subtracted.
    along_row = tl.sum(grad_normalized * normalized, 0) / WIDTH
    along_mean = tl.sum(grad_normalized, 0) / WIDTH
    return (grad_normalized - normalized * along_row - along_mean) * rstd


@triton.jit
def _add_and_norm(  # type: ignore[no-untyped-def]
    tokens, product, linear_bias, norm_weight, norm_bias, molecule, path_scale, seed,
    output, statistics, count, epsilon, probability,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    at = row * WIDTH + column
    kept = _kept_factor(seed, row, column, probability, DROPS)
    path = _path_factor(molecule, path_scale, row, row < count, SCALES)
    total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    branch += path * tl.load(linear_bias + column, mask=inside, other=0.0).to(tl.float32)
    total += kept * branch
    mean = tl.sum(total, 0) / WIDTH
    centred = tl.where(inside, total - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + epsilon)
    result = centred * rstd * tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + count + row, rstd)


@triton.jit
def _add_and_norm_backward(  # type: ignore[no-untyped-def]
    grad_output, tokens, product, linear_bias, norm_weight, statistics, molecule, path_scale, seed,
    grad_tokens, grad_product, grad_linear_bias_parts, grad_norm_weight_parts, grad_norm_bias_parts,
    count, probability,
    SAME: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(linear_bias + column, mask=inside, other=0.0).to(tl.float32)
    grad_linear_bias = tl.zeros((TILE,), tl.float32)
    grad_norm_weight = tl.zeros((TILE,), tl.float32)
    grad_norm_bias = tl.zeros((TILE,), tl.float32)
    row = program.to(tl.int64)
    while row < count:
        at = row * WIDTH + column
        kept = _kept_factor(seed, row, column, probability, DROPS)
        path = _path_factor(molecule, path_scale, row, row < count, SCALES)
        total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(product + at, mask=inside, other=0.0).to(tl.float32) + path * bias
        total += kept * branch
        rstd = tl.load(statistics + count + row)
        normalized = tl.where(inside, (total - tl.load(statistics + row)) * rstd, 0.0)
        upstream = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
        grad_norm_weight += upstream * normalized
        grad_norm_bias += upstream
        result = gradient_through_norm(upstream, normalized, weight, rstd, WIDTH)
        tl.store(grad_tokens + at, result.to(grad_tokens.dtype.element_ty), mask=inside)
        result *= kept
        grad_linear_bias += path * result
        if not SAME:
            tl.store(grad_product + at, result.to(grad_product.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    to = program.to(tl.int64) * WIDTH + column
    tl.store(grad_linear_bias_parts + to, grad_linear_bias, mask=inside)
    tl.store(grad_norm_weight_parts + to, grad_norm_weight, mask=inside)
    tl.store(grad_norm_bias_parts + to, grad_norm_bias, mask=inside)


@triton.jit
def _gelu(  # type: ignore[no-untyped-def]
    product, linear_bias, molecule, path_scale, seed, output, count, probability,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    at = row * WIDTH + column
    inside = (row < count) & (column < WIDTH)
    value = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(linear_bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    path = _path_factor(molecule, path_scale, row, row < count, SCALES)
    result *= path * _kept_factor(seed, row, column, probability, DROPS)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(  # type: ignore[no-untyped-def]
    grad_output, product, linear_bias, molecule, path_scale, seed, grad_product, grad_linear_bias_parts,
    count, probability,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(linear_bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    grad_linear_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * ROWS
    while first < count:
        at = row[:, None] * WIDTH + column[None, :]
        inside = (row < count)[:, None] & (column < WIDTH)[None, :]
        value = tl.load(product + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        upstream = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
        # GELU is x * Phi(x), with the normal distribution Phi; its derivative is Phi(x) + x * density(x).
        distribution = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        # exp(-x^2 / 2) as a power of two, an instruction of its own.
        density = tl.exp2(-0.7213475204444817 * value * value) * 0.3989422804014327
        result = upstream * (distribution + value * density)
        path = _path_factor(molecule, path_scale, row, row < count, SCALES)
        kept = _kept_factor(seed, row[:, None], column[None, :], probability, DROPS)
        result *= path[:, None] * kept
        grad_linear_bias += result
        tl.store(grad_product + at, result.to(grad_product.dtype.element_ty), mask=inside)
        row += tl.num_programs(0) * ROWS
        first += tl.num_programs(0) * ROWS
    to = tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(grad_linear_bias_parts + to, tl.sum(grad_linear_bias, 0), mask=column < WIDTH)
