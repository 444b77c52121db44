"""How fast and how large: matrix-product rate of a device, peak memory, and the rates of a step's record.

Model FLOPs utilisation is measured against the rate that a square matrix product reaches on the same device in the same
process, not against a data sheet: what a step could reach here and now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import torch
from torch import Tensor

from moleblend_ray import host
from moleblend_ray.training.config import Precision
from moleblend_ray.training.metrics import Record

_SMALLEST_MATRIX: Final = 256
_LARGEST_MATRIX: Final = {"cpu": 2048, "cuda": 8192}
_LONG_ENOUGH_S: Final = {"cpu": 0.005, "cuda": 0.001}
"""A product that takes as long is as fast as a larger one, which slow CPUs need seconds for."""
_REPEATS: Final = 5
MATRIX_TYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of the factors of matrix products at each setting of ``train.precision``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    """Gives the rates of a run on equal devices."""

    device: torch.device
    matrix_rate: float
    """Operations a second of matrix products, summed over the devices of all ranks."""

    @classmethod
    def of_device(cls, device: torch.device, precision: Precision, world_size: int) -> Meter:
        """Measure this device, once in a process, for it takes some tenths of a second; the others are taken to be alike."""
        return cls(device=device, matrix_rate=_first_rate(device, precision) * world_size)

    def rates(self, record: Record, step_s: float) -> Record:
        """Rates of the step of this ``record``, which took ``step_s`` seconds, and this rank's peak memory."""
        return {
            "molecules_per_s": record["molecules"] / step_s,
            "atoms_per_s": record["atoms"] / step_s,
            "mfu": record["model_flops"] / step_s / self.matrix_rate,
            "peak_memory_mib": peak_memory_bytes(self.device) / 2**20,
        }


@cache
def _first_rate(device: torch.device, precision: Precision) -> float:
    return matrix_rate(device, precision)


def matrix_rate(device: torch.device, precision: Precision) -> float:
    """Operations a second of a square matrix product in ``precision`` with this process's threads, the best of five."""
    size = _SMALLEST_MATRIX
    while True:
        product = _product(size, device, MATRIX_TYPES[precision])
        product()
        long_enough = seconds_of(product, device) >= _LONG_ENOUGH_S[device.type]
        if long_enough or 2 * size > _LARGEST_MATRIX[device.type]:
            break
        size *= 2
    return 2 * size**3 / min(seconds_of(product, device) for _ in range(_REPEATS))


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    left, right = torch.rand(2, size, size, device=device).to(dtype)
    result = torch.empty_like(left)
    return partial(torch.mm, left, right, out=result)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run`` takes, with all work that it puts on the device."""
    _synchronize(device)
    begin = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begin


def compiled_graphs() -> int:
    """Programs that ``torch.compile`` has made in this process: one that still rises after the first validation, which
    adds its own, is a shape too many."""
    from torch._dynamo.utils import counters  # takes a second, and only who compiles needs it

    return int(counters["stats"]["unique_graphs"])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: that of the allocator on a GPU, of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host.peak_memory_bytes()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
