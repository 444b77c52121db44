"""What lies between the matrix products of a block, each step as one operation: a Triton kernel on GPUs, plain code elsewhere.

Shape legend: B molecules, S tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.dropout import dropout

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_use_kernels = os.environ.get("MOLEBLEND_KERNELS", "on") != "off"


@contextlib.contextmanager
def plain_code() -> Iterator[None]:
    """Within, GPUs compute by PyTorch's own operations, as with ``MOLEBLEND_KERNELS=off`` in the environment: to compare
    with, or where a kernel is under suspicion."""
    global _use_kernels
    before, _use_kernels = _use_kernels, False
    try:
        yield
    finally:
        _use_kernels = before


def uses_triton() -> bool:
    """True if Triton can compile kernels here, and they are wanted."""
    return _use_kernels and _triton_works()


@functools.cache
def _triton_works() -> bool:
    """Whether Triton is installed, as it is with builds of PyTorch for GPUs, with what it builds launchers of kernels from."""
    if importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if compiler and headers.exists():
        return True
    missing = f"{headers} (Debian: python3-dev)" if compiler else "a C compiler (gcc, or CC)"
    logger.warning(
        "Triton kernels are off, training on a GPU takes two to three times as long: %s is missing",
        missing,
    )
    return False


def kernels_fit(values: Tensor) -> bool:
    """True if Triton kernels can compute with ``values``. What ``torch.compile`` reads it shall fuse itself."""
    return (
        values.device.type == "cuda"
        and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and uses_triton()
        and not torch.compiler.is_compiling()
    )


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """``launch``, whose first argument is a tensor, with this tensor's GPU as the current one: Triton launches there."""

    @functools.wraps(launch)
    def launch_there(*arguments: P.args, **settings: P.kwargs) -> R:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            return launch(*arguments, **settings)

    return launch_there


def add_and_norm(
    tokens: Tensor,
    inputs: Tensor,
    linear: nn.Linear,
    norm: nn.LayerNorm,
    *,
    molecule: Tensor,
    factor: Tensor | None,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    """(S, D) LayerNorm of ``tokens`` (S, D) plus a branch: ``linear`` of ``inputs``, after dropout with ``probability`` and times
    ``factor`` (B,) of the token's ``molecule`` (S,).

    ``seed`` (1,) int64 decides what is dropped on a GPU. There the result has the type of the branch, bfloat16 under autocast.
    """
    if kernels_fit(tokens) and kernels_fit(inputs):
        product = F.linear(inputs, linear.weight)
        output: Tensor = _AddAndNorm.apply(  # type: ignore[no-untyped-call]
            tokens, product, linear.bias, norm.weight, norm.bias, norm.eps, molecule, factor,
            seed if probability > 0.0 else None, probability,
        )  # fmt: skip
        return output
    branch = dropout(linear(inputs), probability, training=True)
    if factor is not None:
        branch = branch * factor[molecule, None]
    plain: Tensor = norm(tokens + branch)
    return plain


def gelu_and_dropout(
    inputs: Tensor, linear: nn.Linear, *, probability: float, seed: Tensor | None
) -> Tensor:
    """(S, F) GELU of ``linear`` of ``inputs`` (S, D), then dropout; ``seed`` as in :func:`add_and_norm`."""
    if kernels_fit(inputs):
        product = F.linear(inputs, linear.weight)
        seed = seed if probability > 0.0 else None
        output: Tensor = _GeluAndDropout.apply(product, linear.bias, seed, probability)  # type: ignore[no-untyped-call]
        return output
    return dropout(F.gelu(linear(inputs)), probability, training=True)


class _AddAndNorm(torch.autograd.Function):
    """Adds the bias of the linear map as well: its gradient then costs no pass over the branch's."""

    @staticmethod
    def forward(
        context: Any,
        tokens: Tensor,
        product: Tensor,
        offset: Tensor,
        weight: Tensor,
        shift: Tensor,
        epsilon: float,
        molecule: Tensor,
        factor: Tensor | None,
        seed: Tensor | None,
        probability: float,
    ) -> Tensor:
        from moleblend_ray.model.block_kernels import add_and_norm_forward

        output, statistics = add_and_norm_forward(
            tokens, product, offset, weight, shift, epsilon, molecule, factor, seed, probability
        )
        context.save_for_backward(
            tokens, product, offset, weight, statistics, molecule, factor, seed
        )
        context.probability, context.of_shift = probability, shift.dtype
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.block_kernels import add_and_norm_backward

        tokens, product, offset, weight, statistics, molecule, factor, seed = context.saved_tensors
        of_tokens, of_product, sums = add_and_norm_backward(
            gradient.contiguous(),
            tokens,
            product,
            offset,
            weight,
            statistics,
            molecule,
            factor,
            seed,
            context.probability,
        )
        of_offset, of_weight, of_shift = (
            total.to(dtype)
            for total, dtype in zip(
                sums, (offset.dtype, weight.dtype, context.of_shift), strict=True
            )
        )
        return (of_tokens, of_product, of_offset, of_weight, of_shift) + (None,) * 5


class _GeluAndDropout(torch.autograd.Function):
    """Adds the bias of the linear map as well, as :class:`_AddAndNorm` does."""

    @staticmethod
    def forward(
        context: Any, product: Tensor, offset: Tensor, seed: Tensor | None, probability: float
    ) -> Tensor:
        from moleblend_ray.model.block_kernels import gelu_forward

        context.save_for_backward(product, offset, seed)
        context.probability = probability
        return gelu_forward(product, offset, seed, probability)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from moleblend_ray.model.block_kernels import gelu_backward

        product, offset, seed = context.saved_tensors
        of_product, of_offset = gelu_backward(
            gradient.contiguous(), product, offset, seed, context.probability
        )
        return of_product, of_offset.to(offset.dtype), None, None
