"""The steps between the matrix products of a block, each a Triton kernel on GPUs and plain PyTorch code elsewhere.

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
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.dropout import dropout
from moleblend_ray.model.precision import product_type

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_use_kernels = os.environ.get("MOLEBLEND_KERNELS", "on") != "off"


@contextlib.contextmanager
def plain_code() -> Iterator[None]:
    """A context in which GPUs use PyTorch's own operations, as with ``MOLEBLEND_KERNELS=off`` in the environment.

    For comparisons, and to find out whether a kernel is at fault.
    """
    global _use_kernels
    before, _use_kernels = _use_kernels, False
    try:
        yield
    finally:
        _use_kernels = before


def uses_triton() -> bool:
    """True if kernels are switched on and Triton can compile them on this machine."""
    return _use_kernels and _triton_works()


@functools.cache
def _triton_works() -> bool:
    """True if Triton is installed, and a C compiler and Python's headers, which it needs to launch kernels.

    Builds of PyTorch for GPUs bring Triton along.
    """
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
    """True if the Triton kernels can take ``values``: on a GPU, in a type they know, and Triton works.

    False while ``torch.compile`` traces the code: it fuses PyTorch's operations itself.
    """
    return (
        on_gpu(values)
        and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and uses_triton()
        and not torch.compiler.is_compiling()
    )


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``launch`` to run with the GPU of its first argument, a tensor, as the current one.

    Triton launches kernels on the current GPU.
    """

    @functools.wraps(launch)
    def launch_there(*arguments: P.args, **settings: P.kwargs) -> R:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            return launch(*arguments, **settings)

    return launch_there


class PathScale(NamedTuple):
    """What stochastic depth multiplies a branch with: 0, or more than 1.

    On a GPU the input of the branch's last linear map is multiplied, and its bias. The gradient of the branch is then that
    of the residual sum, and needs no tensor of its own.
    """

    factor: Tensor
    """(B,), of each molecule."""
    molecule: Tensor
    """(S,) int64, the molecule of each token."""

    def of_tokens(self) -> Tensor:
        """(S, 1), the factor of each token."""
        return self.factor[self.molecule, None]


def add_and_norm(
    tokens: Tensor,
    inputs: Tensor,
    linear: nn.Linear,
    norm: nn.LayerNorm,
    *,
    path: PathScale | None,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    """(S, D) LayerNorm of ``tokens`` (S, D) plus a branch.

    The branch is ``linear`` of ``inputs``, after dropout with ``probability``, times ``path``. ``seed`` (1,) int64 decides
    what is dropped on a GPU. There the result has the type of the branch, bfloat16 under autocast, and the ``inputs`` must
    already be multiplied with ``path``.
    """
    if kernels_fit(tokens):
        product = F.linear(inputs, linear.weight)
        output: Tensor = _AddAndNorm.apply(  # type: ignore[no-untyped-call]
            tokens, product, linear.bias, norm.weight, norm.bias, norm.eps, path,
            seed if probability > 0.0 else None, probability,
        )  # fmt: skip
        return output
    branch = dropout(linear(inputs), probability, training=True)
    if path is not None:
        branch = branch * path.of_tokens()
    plain: Tensor = norm(tokens + branch)
    return plain


def gelu_and_dropout(
    tokens: Tensor,
    linear: nn.Linear,
    *,
    path: PathScale | None,
    probability: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(S, F) GELU of ``linear`` of ``tokens`` (S, D), then dropout; and ``tokens``, for the residual sum.

    On a GPU the result is multiplied with ``path``. ``seed`` is as in :func:`add_and_norm`.
    """
    if kernels_fit(tokens):
        product, tokens = linear_and_residual(tokens, linear.weight)
        seed = seed if probability > 0.0 else None
        output: Tensor = _GeluAndDropout.apply(product, linear.bias, path, seed, probability)  # type: ignore[no-untyped-call]
        return output, tokens
    return dropout(F.gelu(linear(tokens)), probability, training=True), tokens


def linear_and_residual(
    tokens: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(S, F) linear map of ``tokens`` (S, D), and ``tokens``, for the residual sum beside it.

    The matrix product of the backward pass adds the gradient of the residual sum to its result. Autograd would add the
    two in a pass of its own. ``weight`` is (F, D); ``bias`` (F,) gets no gradient here.
    """
    with_residual: tuple[Tensor, Tensor] = _LinearAndResidual.apply(tokens, weight, bias)  # type: ignore[no-untyped-call]
    return with_residual


class _AddAndNorm(torch.autograd.Function):
    """Adds the bias of the linear map too, so that its gradient needs no pass of its own over that of the branch."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        product: Tensor,
        linear_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        epsilon: float,
        path: PathScale | None,
        seed: Tensor | None,
        probability: float,
    ) -> Tensor:
        from moleblend_ray.model.block_kernels import add_and_norm_forward

        output, statistics = add_and_norm_forward(
            tokens, product, linear_bias, norm_weight, norm_bias, epsilon, path, seed, probability
        )
        ctx.save_for_backward(tokens, product, linear_bias, norm_weight, statistics, seed)
        ctx.path, ctx.probability, ctx.norm_bias_dtype = path, probability, norm_bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.block_kernels import add_and_norm_backward

        tokens, product, linear_bias, norm_weight, statistics, seed = ctx.saved_tensors
        grad_tokens, grad_product, sums = add_and_norm_backward(
            grad_output.contiguous(),
            tokens,
            product,
            linear_bias,
            norm_weight,
            statistics,
            ctx.path,
            seed,
            ctx.probability,
        )
        dtypes = linear_bias.dtype, norm_weight.dtype, ctx.norm_bias_dtype
        grad_parameters = (total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))
        return grad_tokens, grad_product, *grad_parameters, None, None, None, None


class _LinearAndResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = product_type(tokens)
        inputs, matrix = tokens.to(dtype), weight.to(dtype)
        ctx.save_for_backward(inputs, matrix)
        ctx.dtypes = tokens.dtype, weight.dtype
        with torch.autocast(tokens.device.type, enabled=False):
            product = F.linear(inputs, matrix, None if bias is None else bias.detach().to(dtype))
        return product, tokens.view_as(tokens)

    @staticmethod
    def backward(
        ctx: Any, grad_product: Tensor, grad_residual: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        inputs, matrix = ctx.saved_tensors
        tokens_dtype, weight_dtype = ctx.dtypes
        if tokens_dtype == matrix.dtype:
            grad_tokens = torch.addmm(grad_residual, grad_product, matrix)
        else:
            grad_tokens = grad_residual + grad_product @ matrix
        return grad_tokens, (grad_product.t() @ inputs).to(weight_dtype), None


class _GeluAndDropout(torch.autograd.Function):
    """Adds the bias of the linear map too, as :class:`_AddAndNorm` does."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Tensor,
        linear_bias: Tensor,
        path: PathScale | None,
        seed: Tensor | None,
        probability: float,
    ) -> Tensor:
        from moleblend_ray.model.block_kernels import gelu_forward

        ctx.save_for_backward(product, linear_bias, seed)
        ctx.path, ctx.probability = path, probability
        return gelu_forward(product, linear_bias, path, seed, probability)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.block_kernels import gelu_backward

        product, linear_bias, seed = ctx.saved_tensors
        grad_product, grad_linear_bias = gelu_backward(
            grad_output.contiguous(), product, linear_bias, ctx.path, seed, ctx.probability
        )
        return grad_product, grad_linear_bias.to(linear_bias.dtype), None, None, None
