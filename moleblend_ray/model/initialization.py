"""Initial weights: those of a module are a function of the seed and of its name alone.

So they are the same on any number of ranks, though no rank holds more than its shards and one whole tensor, and a head more
or less leaves all others as they are. Modules with parameters of their own draw them in ``reset_parameters``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

INIT_STD: Final = 0.02
"""Standard deviation of linear and embedding weights at the start (as the official code)."""

_LARGEST_SEED: Final = 2**62


@runtime_checkable
class HasConstants(Protocol):
    """A module with buffers that no checkpoint holds, as they never change."""

    def fill_constants(self) -> None:
        """Give these buffers their values."""


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give the parameters and buffers of ``module``, which are on the meta device, memory on ``device`` that holds anything.

    ``module.to_empty`` does the same, but imports SymPy for it, a third of the time in which a small model is loaded.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def init_weights(module: nn.Module) -> None:
    """Draw the weights of ``module`` and of all within, which may be sharded, and fill their constant buffers.

    Linear weights have standard deviation 0.02, biases are 0, other modules draw their own. One number is taken from
    PyTorch's generator of the CPU as the seed of all; ranks that share a model need the same.
    """
    seed = int(torch.randint(_LARGEST_SEED, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        for name, part in module.named_modules():
            torch.default_generator.manual_seed(_seed_of(name, seed))
            _init_own_weights(part)
    fill_constants(module)


def fill_constants(module: nn.Module) -> None:
    """Fill the constant buffers of ``module`` and of all within: for models whose weights are loaded, not drawn."""
    for part in module.modules():
        if isinstance(part, HasConstants):
            part.fill_constants()


def new_embedding(rows: int, width: int) -> nn.Embedding:
    """A table whose weights are still to be drawn.

    ``nn.Embedding(rows, width)`` draws them itself. On the meta device that imports PyTorch's compiler, which takes a second.
    """
    values = torch.empty(rows, width)
    table: nn.Embedding = nn.Embedding.from_pretrained(values, freeze=False)  # type: ignore[no-untyped-call]
    return table


def draw_normal(weight: Tensor) -> None:
    """Draw ``weight``, whole or sharded, from a normal distribution with standard deviation 0.02."""
    _draw(weight, lambda whole: nn.init.normal_(whole, std=INIT_STD))


def draw_uniform(weight: Tensor, low: float, high: float) -> None:
    """Draw ``weight``, whole or sharded, uniformly between ``low`` and ``high``."""
    _draw(weight, lambda whole: nn.init.uniform_(whole, low, high))


def _draw(weight: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    if weight.device.type == "meta":
        return  # nothing to fill, see also `new_embedding`
    is_whole = type(weight) in {Tensor, nn.Parameter}
    if is_whole and weight.device.type == "cpu":
        draw(weight)
        return
    # On the CPU, for GPUs draw other numbers. Every rank draws the whole tensor and keeps its part of it.
    drawn = draw(torch.empty(weight.shape, dtype=weight.dtype, device="cpu"))
    with torch.no_grad():
        weight.copy_(drawn if is_whole else _part_of_rank(drawn, weight))


def _part_of_rank(whole: Tensor, like: Tensor) -> Tensor:
    """``whole`` sharded as ``like``, without communication."""
    # Here, because inference needs neither this module nor the half second that its import takes.
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _init_own_weights(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        draw_normal(part.weight)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif not isinstance(part, nn.Embedding):
        # Not embeddings, which the module that holds them draws. The others include LayerNorm.
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
