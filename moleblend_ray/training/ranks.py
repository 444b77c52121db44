"""The processes that train together, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moleblend_ray.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    """Number of this process, from 0."""

    world_size: int = 1
    """Number of processes."""

    local_rank: int = 0
    """Number of this process on its machine, from 0."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""

    @property
    def is_first(self) -> bool:
        """True for the one rank that writes logs and markers."""
        return self.rank == 0


def current_ranks(*, use_gpu: bool, local_rank: int) -> Ranks:
    """Rank and device of this process, from the process group if there is one; ``local_rank`` is its number on its
    machine."""
    device = torch.device("cpu")
    if use_gpu:
        if not torch.cuda.is_available():
            raise ConfigError("a GPU was asked for but torch finds none; set cluster.use_gpu=false")
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        return Ranks(local_rank=local_rank, device=device)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
    )


def sum_over_ranks(values: Tensor) -> Tensor:
    """``values`` summed over all ranks, in place, and returned."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_from_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The picklable ``value`` of every rank, in rank order; also a barrier. ``group``: of all ranks, None for the default one."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered
